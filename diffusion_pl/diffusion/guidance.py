"""Guidance and clipping: functions that turn one denoiser into another, denoise -> denoise.

Keywords that are not theirs pass through to the denoiser below. What a network says of the variance
is never extrapolated: it stays the conditional model's.

| guidance | formula | source |
|---|---|---|
| classifier-free | see classifier_free.py | |
| interval | the above at sigma in (low, high], else D_all | Kynkaanniemi 2024, arXiv:2404.07724 |
| autoguidance | D_bad + w (D_main - D_bad) | Karras 2024, arXiv:2406.02507 |
| sparse | D_routed + w (D - D_routed) | Krause 2026, arXiv:2601.01608 |
| dynamic threshold | clip to s, divide by s | Saharia 2022, arXiv:2205.11487, 2.3 |
| clamped velocity | (1 - r) t x + r D, r = min(1, (1 - t) / t_eps) | Li & He 2025, Alg. 2 |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from diffusion_pl.diffusion.classifier_free import (
    Weight,
    classifier_free,
    conditioned,
    extrapolated,
    is_plain,
)
from diffusion_pl.diffusion.conditions import HIDEABLE, KINDS, Condition, sizes
from diffusion_pl.diffusion.levels import per_image
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.diffusion.random import generator
from diffusion_pl.errors import UserError
from diffusion_pl.seeds import seed_of

EVERYWHERE = (0.0, math.inf)


@dataclass(frozen=True)
class Guide:
    """The weaker model of autoguidance.

    Args:
        name: where it comes from, for the record of what was measured.
        denoiser: D_bad, of the same images and conditions as the model it guides.
        routed: whether it takes what `by_image` hands it.
    """

    name: str
    denoiser: Denoiser
    routed: bool = False

    def check(self, shape: tuple[int, int, int], taken: Mapping[str, int], weight: Weight) -> None:
        """Refuse a guide that does not fit the model it is to guide, or has nothing to do.

        Args:
            shape: (C, H, W) of the model's images.
            taken: how much of each kind of condition the model takes, see `conditions.sizes`.
            weight: of the guidance.

        Raises:
            UserError: names what differs.
        """
        network: Any = self.denoiser.network
        if is_plain(weight):
            raise UserError(f"{self.name}: a guide does nothing at guidance 1; give a weight")
        if isinstance(weight, Mapping):
            raise UserError(
                f"{self.name}: a guide sees all conditions; give guidance as one number"
            )
        own = _listed(network.channels, sizes(network))
        if own != (needed := _listed(shape[0], taken)):
            raise UserError(
                f"{self.name}: is no guide for this model: it has {own}, the model {needed}"
            )
        try:
            network.check_resolution(*shape[1:])
        except ValueError as error:
            raise UserError(f"{self.name}: is no guide for this model: {error}") from error


def _listed(channels: int, taken: Mapping[str, int]) -> str:
    """The sizes that a guide and its model have in common, in words."""
    named = {KINDS[kind].size: size for kind, size in taken.items() if size}
    return ", ".join(f"{name} {size}" for name, size in {"channels": channels, **named}.items())


@runtime_checkable
class Router(Protocol):
    """What routes the tokens of a network; see networks/routing.py."""

    p: float  # the rate of training
    length: int  # places at which an image's window of the row may begin

    def row(self, source: torch.Generator) -> Tensor:
        """The row that decides which tokens are routed."""

    def evaluated(self, rate: float, row: Tensor, places: Tensor) -> AbstractContextManager[None]:
        """Context in which tokens are routed in evaluation."""


def router_of(network: nn.Module) -> Router:
    """What routed the tokens of a network in its training.

    Raises:
        UserError: nothing did.
    """
    for part in network.modules():
        if isinstance(part, Router) and part.p:
            return part
    raise UserError(
        "guidance by routed tokens needs a network that was trained with them; train with "
        "network.routing, or let a weaker run guide: --guide RUN"
    )


@dataclass(frozen=True)
class Routed:
    """The model as its own guide, with a part of its tokens routed; both see the label.

    Sparse guidance (Krause 2026, arXiv:2601.01608, with gamma_strong = 0), for a network that was
    trained with routing, which classifier-free guidance helps little.

    Args:
        rate: share of the tokens that skip the routed blocks, gamma_weak, in (0, 1); above the rate
            of training, or the guide is about as good as the model.
    """

    rate: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise UserError(f"the rate of a routed guide must be in (0, 1) (got {self.rate})")

    def check(self, network: nn.Module, weight: Weight) -> None:
        """Refuse a network that was not trained with routing, or a guide with nothing to do.

        Args:
            network: as it was trained; its weights are not looked at.
            weight: of the guidance.

        Raises:
            UserError: says what to do.
        """
        if is_plain(weight):
            raise UserError("a guide does nothing at guidance 1; give a weight")
        router_of(network)

    def guide(self, denoiser: Denoiser) -> Guide:
        """The guide that a denoiser is to itself; it has the same weights.

        Raises:
            UserError: the network was not trained with routing.
        """
        network = RoutedNetwork(denoiser.network, self.rate)
        return Guide(f"routed:{self.rate:g}", Denoiser(network, denoiser.preconditioning), True)


def guide_of(guide: Guide | Routed | None, denoiser: Denoiser) -> Guide | None:
    """The guide of a denoiser, which may be that denoiser itself."""
    return guide.guide(denoiser) if isinstance(guide, Routed) else guide


class RoutedNetwork(nn.Module):
    """A network, its tokens routed in evaluation too.

    Args:
        network: the raw F, trained with routing; not copied.
        rate: share of the tokens that skip the routed blocks.
    """

    row: Tensor

    def __init__(self, network: nn.Module, rate: float) -> None:
        super().__init__()
        self.network = network
        self.router = router_of(network)
        self.rate = rate
        self.register_buffer("row", self.router.row(generator(0, "routing row", 0)), False)
        self.channels = network.channels
        for kind, size in sizes(network).items():
            setattr(self, KINDS[kind].size or "", size)
        self.check_resolution = network.check_resolution

    def forward(
        self, x: Tensor, c_noise: Tensor, *, keys: Sequence[int], **condition: Tensor | None
    ) -> Tensor:
        """F with routed tokens, drawn anew at each noise level.

        Args:
            x: (B, C, H, W).
            c_noise: (B,).
            keys: a seed of each image.
        """
        drawn = [
            seed_of(key, "routing", level) % self.router.length
            for key, level in zip(keys, c_noise.tolist(), strict=True)
        ]
        places = torch.tensor(drawn, device=x.device)
        with self.router.evaluated(self.rate, self.row, places):
            # Not `network(...)`, whose hooks count the model's own evaluations.
            output: Tensor = self.network.forward(x, c_noise, **condition)
        return output


def by_image(guide: Denoise, seed: int, indices: Sequence[int] | None) -> Denoise:
    """A routed guide that draws from (seed, image index, noise level) alone.

    Args:
        indices: of the images; None: their places in the batch.
    """

    def denoise(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        own = range(len(x)) if indices is None else indices
        return guide(x, sigma, keys=[seed_of(seed, "guide", index) for index in own], **more)

    return denoise


def guided(
    denoise: Denoise,
    *,
    condition: Condition,
    weight: Weight,
    kinds: Collection[str] = HIDEABLE,
    interval: tuple[float, float] = EVERYWHERE,
    guide: Denoise | None = None,
) -> Denoise:
    """The guidance that a weight, an interval and perhaps a weaker model ask for.

    Args:
        denoise: the model.
        condition: what the images are to be, a row an image; {} for an unconditional model.
        weight: 1 is the plain conditional model, which alone is then evaluated.
        kinds: that one weight removes together.
        interval: levels (low, high] that are guided.
        guide: the weaker model of autoguidance; None for the model itself without its conditions.
    """
    plain = conditioned(denoise, **condition)
    if is_plain(weight):
        return plain
    if guide is not None:
        assert not isinstance(weight, Mapping)
        strong = autoguided(plain, conditioned(guide, **condition), weight=weight)
    else:
        strong = classifier_free(denoise, condition=condition, weight=weight, kinds=kinds)
    return strong if interval == EVERYWHERE else within(strong, plain, interval)


def autoguided(denoise: Denoise, guide: Denoise, *, weight: float) -> Denoise:
    """Autoguidance, D = D_bad + weight (D_main - D_bad) (Karras 2024).

    Args:
        denoise: the model, its label closed in.
        guide: a weaker one of the same images and the same label: smaller or less trained.
        weight: 1 is the plain model. A call costs one evaluation of either network.
    """

    def guide_by(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        # The guide is asked for the image alone: it may say nothing of the variance.
        return extrapolated(guide(x, sigma), denoise(x, sigma, **more), weight, x.shape[1])

    return guide_by


def within(strong: Denoise, plain: Denoise, interval: tuple[float, float]) -> Denoise:
    """Guide at sigma in (low, high] only (Kynkaanniemi 2024); elsewhere the plain model.

    Args:
        strong: the guided denoiser.
        plain: the conditional one, which costs one evaluation.
        interval: low and high.

    Raises:
        UserError: low is not below high.
    """
    low, high = interval
    check_interval(interval)

    def guide(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        inside = (sigma > low) & (sigma <= high)
        if bool(inside.all()):
            return strong(x, sigma, **more)
        if not bool(inside.any()):
            return plain(x, sigma, **more)
        # A batch of several levels, which no sampler makes.
        both = strong(x, sigma, **more), plain(x, sigma, **more)
        return torch.where(per_image(inside, x), *both)

    return guide


def check_interval(interval: tuple[float, float]) -> None:
    """Raise ValueError unless an interval of levels has its lower end below its upper one."""
    low, high = interval
    if not 0 <= low < high:
        raise UserError(
            f"a guidance interval needs 0 <= low < high (got {low:g} to {high:g}); swap them?"
        )


Clip = bool | float | Callable[[Tensor], Tensor]


def clipped(denoise: Denoise, clip: Clip = True) -> Denoise:
    """Keep the denoised image within the range of images, as DDPM's sampler does (released code).

    Args:
        denoise: D.
        clip: as for `clip_of`.
    """
    limit = clip_of(clip)

    def clip_image(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        image, variance = denoise(x, sigma, **more).tensor_split([x.shape[1]], dim=1)
        return torch.cat([limit(image), variance], dim=1)

    return clip_image


def clip_of(clip: Clip) -> Callable[[Tensor], Tensor]:
    """What is done to a denoised image (B, C, H, W).

    Args:
        clip: False for nothing, True to clip it to [-1, 1], a number to clip it to that limit on
            either side, or a function of it, such as `thresholded`.
    """
    if callable(clip):
        return clip
    limit = float(clip)
    return (lambda image: image.clamp(-limit, limit)) if limit else (lambda image: image)


def thresholded(image: Tensor, share: float = 0.995, most: float = 1.0) -> Tensor:
    """Dynamic thresholding (Saharia 2022, arXiv:2205.11487, 2.3): clip to s, then divide by s.

    Args:
        image: denoised, (B, C, H, W).
        share: s is the quantile of abs(image) at this share of an image's values.
        most: the largest s; s is at least 1. By diffusers' default 1, it is plain clipping.
    """
    s = torch.quantile(image.abs().flatten(1), share, dim=1).clamp(1.0, max(1.0, most))
    s = s[:, None, None, None]
    return image.clamp(-s, s) / s


@dataclass(frozen=True)
class VelocityClamp:
    """The released sampler of JiT divides by max(1 - t, t_eps), t = s / (s + sigma), for a velocity

        v = (D - z) / max(1 - t, t_eps) ,   z = t x ,

    which moves as far as the plain velocity of (1 - r) z + r D, r = min(1, (1 - t) / t_eps), does.
    So the last steps leave noise in the image: Heun's method in 50 equal steps of t ends at 0.983
    of the image and noise of 0.017 s, two of 255 levels. Published numbers were measured with it.

    Args:
        t_eps: smallest 1 - t, in (0, 1); 0.05 as published.
        noise_scale: s of the objective.
    """

    t_eps: float = 0.05
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.t_eps < 1:
            raise UserError(f"t_eps must be in (0, 1) (got {self.t_eps})")
        if self.noise_scale <= 0:
            raise UserError(f"noise_scale must be positive (got {self.noise_scale})")

    def __call__(self, denoise: Denoise) -> Denoise:
        """The denoiser whose plain velocity is the clamped one."""

        def clamp(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
            image, variance = denoise(x, sigma, **more).tensor_split([x.shape[1]], dim=1)
            level = sigma.to(torch.float64)
            total = self.noise_scale + level
            r = (level / total / self.t_eps).clamp(max=1.0)
            kept = per_image((1 - r) * self.noise_scale / total, x)
            image = (kept * x + per_image(r, x) * image).to(image.dtype)
            return torch.cat([image, variance], dim=1)

        return clamp
