"""Pyramidal sampling, coarse to fine with one denoiser: Ryu & Ye, Pyramidal Denoising Diffusion
Probabilistic Models, 2022, arXiv:2208.01864, by the shortcut of Chung, Sim & Ye,
Come-Closer-Diffuse-Faster (CCDF), 2022, arXiv:2112.05146.

| part | formula | where |
|---|---|---|
| smallest size | the base sampler, from noise | Ryu 2022, pyramidal reverse sampling |
| next size | x_0 = the last image enlarged | the same |
| restart | x = x_0 + sigma z, the rest of the levels from there | CCDF's forward jump to t_0 T |

In the variance-preserving state the jump is sqrt(abar) x_0 + sqrt(1 - abar) z, the above times
sqrt(abar). The reverse process contracts the error of x_0, so the levels above the restart may be
left out. How low it may be: noise of level sigma is one of sigma / f in an image f times smaller,
so a restart far above f draws the small image anew, and one below the detail that is still missing
adds too little of it.

With the restart at the base's highest level a size begins as the base does, from noise alone, and
the smaller ones, which then do not matter, are not sampled: the result is the base's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.resizing import KERNELS, Kernel, resized
from diffusion_pl.diffusion.schedules import Schedule
from diffusion_pl.errors import UserError
from diffusion_pl.samplers.inversion import below
from diffusion_pl.samplers.sampler import Sampler

# A level this near to another, relative to it, is the same one rounded.
SAME = 1e-6


@dataclass(frozen=True)
class PyramidSampler:
    """Samples images from noise at a small size, then enlarges and refines them size by size.

    An evaluation at half the side costs about a quarter: `cost` weighs the steps by their pixels.
    Churn's S_churn is shared among the steps of each size separately.

    Args:
        base: the sampler of every size.
        levels: the sizes, ascending: the longer side in pixels, [16, 32, 64]; or shares of the full
            size that end in 1, [0.25, 0.5, 1]. Any factors; both sides are scaled.
        restart: where every size but the first restarts: one number for all, or one each.
        by: what `restart` counts: "share", the quantile u in (0, 1] of the base's schedule, t_0 of
            CCDF, for a table of timesteps t / T; or "sigma". On a table, the nearest level of it.
        enlarge: how an image is enlarged, "area" (repeats pixels), "bilinear" or "bicubic".

    Raises:
        UserError: levels that do not ascend, a number of restarts unlike that of the levels after
            the first, or an unknown name.
    """

    base: Sampler
    levels: Sequence[float]
    restart: float | Sequence[float] = ()
    by: Literal["share", "sigma"] = "share"
    enlarge: Kernel = "bicubic"

    def __post_init__(self) -> None:
        levels = list(self.levels)
        if not levels or levels[0] <= 0 or any(a >= b for a, b in pairwise(levels)):
            raise UserError(f"levels must be positive and ascend (got {levels})")
        if levels[-1] != 1 and any(level != int(level) for level in levels):
            raise UserError(
                f"levels are whole pixels, or shares of the full size that end in 1 (got {levels})"
            )
        if isinstance(self.restart, Sequence) and len(self.restart) != len(levels) - 1:
            raise UserError(
                f"restart needs a number for each of the {len(levels) - 1} levels after the first, "
                f"or one for all (got {list(self.restart)})"
            )
        for name, value, known in (
            ("by", self.by, ("share", "sigma")),
            ("enlarge", self.enlarge, KERNELS),
        ):
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)} (got {value!r})")

    def sigmas(self) -> Tensor:
        """The base's levels, float64, decreasing to 0; every restart lies among them.

        Raises:
            UserError: as `stages`.
        """
        self.stages()
        return self.base.sigmas()

    def stages(self) -> list[Tensor]:
        """The levels visited at each size: a restart, then the base's levels below it, to 0.

        Raises:
            UserError: a restart above the base's highest level or not above its lowest.
        """
        sigmas = self.base.sigmas()
        higher = len(self.levels) - 1
        restarts = self.restart if isinstance(self.restart, Sequence) else [self.restart] * higher
        return [sigmas, *(self._stage(restart, sigmas) for restart in restarts)]

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of every level of images of a size, in pixels.

        Raises:
            UserError: the last level is another size, or two levels are the same one.
        """
        last = self.levels[-1]
        if last != 1 and last != max(height, width):
            raise UserError(
                f"the pyramid ends at {last:g} pixels, the images have {max(height, width)}; set "
                f"the last of levels to {max(height, width)}, or give levels as shares, up to 1"
            )
        scales = [level / last for level in self.levels]
        sizes = [(round(height * scale), round(width * scale)) for scale in scales]
        if min(sizes[0]) < 1 or any(max(a) >= max(b) for a, b in pairwise(sizes)):
            raise UserError(
                f"levels {list(self.levels)} of {width} x {height} pixels are not all different "
                "sizes; take levels farther apart"
            )
        return sizes

    def sampled_stages(self, height: int, width: int) -> list[tuple[tuple[int, int], Tensor]]:
        """Height and width of every size that is sampled, and the levels visited there, to 0.

        Raises:
            UserError: as `sizes` and `stages`.
        """
        stages = self.stages()
        both = zip(self.sizes(height, width), stages, strict=True)
        return list(both)[self._first(stages) :]

    @property
    def steps(self) -> int:
        """Steps of all sizes that are sampled."""
        stages = self.stages()
        return sum(len(stage) - 1 for stage in stages[self._first(stages) :])

    def cost(self) -> float:
        """Steps of all sizes that are sampled, each by its share of the pixels of the last."""
        stages = self.stages()
        shares = [(level / self.levels[-1]) ** 2 for level in self.levels]
        sampled = list(zip(stages, shares, strict=True))[self._first(stages) :]
        return sum((len(stage) - 1) * share for stage, share in sampled)

    def __call__(
        self, denoise: Denoise, noise: Tensor, randn_like: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Sample images.

        Args:
            denoise: D, called `denoise(x, sigma)` with x (B, C, h, w) of every size and sigma ().
            noise: standard normal (B, C, H, W), of the last size; it serves there, as noise of the
                restart: noise made smaller would be known to the image that it is added to.
            randn_like: draws the noise of the smaller sizes and of stochastic integrators.

        Returns:
            float32 (B, C, H, W), as the base's.

        Raises:
            UserError: as `sizes` and `stages`.
        """
        return self._climb(denoise, noise, randn_like, None)

    def from_image(
        self,
        small: Tensor,
        denoise: Denoise,
        noise: Tensor,
        randn_like: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Start from images of the first size instead of sampling them: super-resolution.

        Args:
            small: (B, C, h, w) in [-1, 1], of the first level's size.
            denoise: as for sampling, and so are the others.
            noise: of the last size.
            randn_like: of the sizes between, and of stochastic integrators.

        Returns:
            float32 (B, C, H, W).

        Raises:
            UserError: images of another size, or as `sizes` and `stages`.
        """
        first = self.sizes(*noise.shape[-2:])[0]
        if tuple(small.shape[-2:]) != first:
            height, width = small.shape[-2:]
            raise UserError(
                f"the pyramid's first level is {first[1]} x {first[0]} pixels, the image "
                f"{width} x {height}"
            )
        return self._climb(denoise, noise, randn_like, small)

    def _climb(
        self,
        denoise: Denoise,
        noise: Tensor,
        randn_like: Callable[[Tensor], Tensor],
        image: Tensor | None,
    ) -> Tensor:
        """Go from size to size, from noise or from an image of the first one."""
        sizes, stages = self.sizes(*noise.shape[-2:]), self.stages()
        begun = 0 if image is None else 1
        for place in range(max(begun, self._first(stages)), len(stages)):
            last = place == len(stages) - 1
            smaller = noise.new_empty(*noise.shape[:2], *sizes[place])
            fresh = noise if last else randn_like(smaller)
            if _whole(stages[place], stages[0]):
                state = self.base.start(fresh)
            else:
                assert image is not None
                enlarged = resized(image.to(torch.float64), sizes[place], self.enlarge)
                state = enlarged + float(stages[place][0]) * fresh.to(torch.float64)
            image = self.base.along(denoise, state, stages[place], randn_like)
        assert image is not None
        return image

    def _first(self, stages: Sequence[Tensor]) -> int:
        """The last size that begins from noise alone: those before it do not matter."""
        return max(place for place, stage in enumerate(stages) if _whole(stage, stages[0]))

    def _stage(self, restart: float, sigmas: Tensor) -> Tensor:
        """The levels from a restart on; all of the base's from its highest level on."""
        highest, lowest = float(sigmas[0]), float(sigmas[-2])
        if self.by == "share":
            if not 0 < restart <= 1:
                raise UserError(f"restart is a share of the schedule, in (0, 1] (got {restart:g})")
            # A spacing may leave the schedule's end out.
            level = min(_at(self.base.schedule, restart), highest)
        else:
            level = restart
        if not lowest < level <= highest * (1 + SAME):
            raise UserError(
                f"a restart must lie above the lowest and up to the highest level that the base "
                f"visits, {lowest:g} to {highest:g} (got {level:g})"
            )
        level = nearest_level(self.base.schedule, level)
        return sigmas if level >= highest * (1 - SAME) else below(sigmas, level)


def _whole(stage: Tensor, sigmas: Tensor) -> bool:
    """Tell whether a size begins at the base's highest level."""
    return bool(stage[0] == sigmas[0])


def _at(schedule: Schedule, u: float) -> float:
    return float(schedule(torch.tensor(u, dtype=torch.float64)))


def nearest_level(schedule: Schedule, level: float) -> float:
    """The level nearest to one that a schedule gives: itself, unless the schedule is a table.

    Args:
        schedule: u -> sigma, increasing, perhaps in steps.
        level: sigma, within the schedule's levels.
    """
    low, high = 0.0, 1.0
    for _ in range(60):  # below the spacing of float64 in [0, 1]
        middle = (low + high) / 2
        low, high = (middle, high) if _at(schedule, middle) < level else (low, middle)
    found = min((_at(schedule, u) for u in (low, high)), key=lambda sigma: abs(sigma - level))
    return level if abs(found - level) <= SAME * level else found
