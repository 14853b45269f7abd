"""Improved DDPM: Nichol & Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021,
arXiv:2102.09672.

| part | formula | where |
|---|---|---|
| noise levels | alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2) | Eq. 17 |
| linear table | betas of T = 1000 times 1000 / T | released code |
| c_noise | the timestep times 1000 / T, so that any T spans the same range | released code |
| variance | exp( f ln beta_t + (1 - f) ln beta_tilde_t ), f = (v + 1) / 2 | Eq. 15 |
| v | the network's last C channels | released code |
| L_hybrid | L_simple + 0.001 L_vlb, whose mean is held fixed | Eq. 16 |
| L_vlb | sum of L_t by one t an image, times T | Eq. 4 |
| importance sampling | p_t in proportion to sqrt( E[L_t^2] ) | Eq. 18 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffusion_pl.diffusion.levels import per_image
from diffusion_pl.diffusion.objective import (
    Denoise,
    EpsWeight,
    Objective,
    TrainingObjective,
    pixel_mean,
)
from diffusion_pl.diffusion.preconditioning import Denoiser, Preconditioning
from diffusion_pl.diffusion.schedules import Schedule
from diffusion_pl.diffusion.timesteps import CosineBetas, LinearBetas, Timesteps
from diffusion_pl.errors import UserError
from diffusion_pl.objectives.ddpm import PredictNoise, VariationalBound
from diffusion_pl.objectives.likelihood import ReverseChain

Table = Literal["cosine", "linear"]


@dataclass(frozen=True)
class Hybrid:
    """L_hybrid: the bound teaches the variance, the simple loss everything else.

    Args:
        schedule: the table, t uniform.
        preconditioning: the four c's around a network of 2 C channels.
        chain: reverse steps of learned variance.
        bound: lambda of Eq. 16.
    """

    schedule: Timesteps
    preconditioning: Preconditioning
    chain: ReverseChain
    bound: float = 0.001

    def denoiser(self, network: nn.Module) -> Denoiser:
        """The denoiser that this objective trains around a raw network."""
        return Denoiser(network, self.preconditioning)

    def loss(
        self, denoise: Denoise, image: Tensor, u: Tensor, noise: Tensor, **condition: Tensor | None
    ) -> Tensor:
        """Eq. 16 by one evaluation; see `Objective.loss`."""
        t, sigma = self.schedule.index(u), self.schedule(u)
        level = per_image(sigma, image).to(torch.float32)
        denoised, share = self.chain.answer(denoise, image + level * noise, t, **condition)
        root = per_image(EpsWeight()(sigma).sqrt(), image).to(torch.float32)
        simple = pixel_mean(root * (denoised - image))
        # Times T: one term stands for the sum of all, and 0.001 is the share of that sum.
        bits = self.schedule.T * self.chain.bits(image, denoised.detach(), share, t)
        return simple + self.bound * bits


class ImportanceSampled(nn.Module):
    """Timesteps drawn in proportion to the size of their loss, the loss weighted back (Eq. 18).

    It keeps the last losses of every timestep, of all devices; until each has enough of them
    timesteps are uniform. A quantile u falls on the timestep where the cumulative p_t passes it, so
    a stratified batch stays stratified. In evaluation mode it remembers nothing. Between
    `begin_step` and `end_step` the probabilities stay as they are, so all micro-batches of a step
    use the same ones.

    Args:
        objective: what is trained; draws u uniformly over its timesteps.
        timesteps: the objective's table.
        keep: losses kept a timestep.
        uniform: share of p_t that is uniform, so that none is forgotten.
    """

    history: Tensor
    seen: Tensor

    def __init__(
        self,
        objective: TrainingObjective,
        timesteps: Timesteps,
        keep: int = 10,
        uniform: float = 0.001,
    ) -> None:
        super().__init__()
        if keep < 1 or not 0 < uniform <= 1:
            raise UserError(
                "keep must be at least 1 and uniform in (0, 1] "
                f"(got keep={keep}, uniform={uniform})"
            )
        self.objective = objective
        self.timesteps = timesteps
        self.uniform = uniform
        self.waiting: list[tuple[Tensor, Tensor]] | None = None  # of the micro-batches of a step
        # Buffers, so that a checkpoint holds them and a resumed run draws the same timesteps.
        self.register_buffer("history", torch.zeros(timesteps.T, keep, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(timesteps.T, dtype=torch.int64))

    @property
    def schedule(self) -> Schedule:
        """u to sigma by the present probabilities."""
        return self.level

    @property
    def preconditioning(self) -> Preconditioning:
        """The inner objective's."""
        return self.objective.preconditioning

    def denoiser(self, network: nn.Module) -> Denoiser:
        """The inner objective's."""
        return self.objective.denoiser(network)

    def probabilities(self) -> Tensor:
        """p_t, float64 (T,)."""
        even = torch.full_like(self.history[:, 0], 1 / self.timesteps.T)
        size = self.history.square().mean(dim=1).sqrt()
        share = torch.where(size.sum() > 0, size / size.sum(), even)
        known = (self.seen >= self.history.shape[1]).all()
        # A tensor's choice, not Python's: nothing waits for the device.
        return torch.where(known, torch.lerp(share, even, self.uniform), even)

    def index(self, u: Tensor) -> Tensor:
        """The timestep of a quantile: int64 (B,)."""
        cumulative = self.probabilities().cumsum(dim=0).to(u.device)
        index = torch.searchsorted(cumulative, u.to(torch.float64).contiguous(), right=True)
        return index.clamp(max=self.timesteps.T - 1)

    def level(self, u: Tensor) -> Tensor:
        """The noise level of a quantile."""
        return self.timesteps.sigmas(u.device)[self.index(u)]

    def loss(
        self, denoise: Denoise, image: Tensor, u: Tensor, noise: Tensor, **condition: Tensor | None
    ) -> Tensor:
        """The inner loss over T p_t, float32 (B,), whose mean is the uniform one's."""
        t, T = self.index(u), self.timesteps.T
        weight = 1 / (T * self.probabilities()[t])
        loss = self.objective.loss(denoise, image, (t + 0.5) / T, noise, **condition)
        if self.training and self.waiting is not None:
            self.waiting.append((t, loss.detach()))
        elif self.training:
            self.remember(t, loss.detach())
        return loss * weight.to(loss.dtype)

    def begin_step(self) -> None:
        """Keep what is to be remembered until the step ends."""
        self.waiting = []

    def end_step(self) -> None:
        """Remember the losses of the step, of all its micro-batches in order."""
        waiting, self.waiting = self.waiting, None
        if waiting:
            self.remember(torch.cat([t for t, _ in waiting]), torch.cat([x for _, x in waiting]))

    def remember(self, t: Tensor, loss: Tensor) -> None:
        """Put the losses of all devices in the place of the oldest.

        Args:
            t: timesteps, int64 (B,), the same B on every device.
            loss: unweighted, (B,).
        """
        t, loss = gathered(t), gathered(loss.to(torch.float64))
        keep = self.history.shape[1]
        same = t[:, None] == t
        earlier, later = same.tril(-1).sum(dim=1), same.triu(1).sum(dim=1)
        slot = (self.seen[t] + earlier) % keep
        # Where one timestep has more losses than fit, all but the last add 0: any order of the
        # writes gives the same sum.
        self.history[t, slot] = 0.0
        self.history.index_put_((t, slot), loss * (later < keep), accumulate=True)
        self.seen.index_add_(0, t, torch.ones_like(t))


def gathered(values: Tensor) -> Tensor:
    """The values of all devices in the order of their ranks; as they are without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values)
    return torch.cat(everyone)


def ImprovedDDPM(T: int = 4000, table: Table = "cosine", bound: float = 0.001) -> Hybrid:
    """L_hybrid with a learned variance.

    Args:
        T: number of timesteps, 4000 in the paper's best runs.
        table: noise levels.
        bound: lambda of Eq. 16.
    """
    timesteps = _table(T, table)
    return Hybrid(
        schedule=timesteps,
        preconditioning=PredictNoise(timesteps, timestep_scale=1000 / T),
        chain=ReverseChain(timesteps, "learned"),
        bound=bound,
    )


def ImprovedDDPMSimple(T: int = 4000, table: Table = "cosine") -> Objective:
    """L_simple on improved DDPM's noise levels, for a network of C channels.

    Args:
        T: number of timesteps.
        table: noise levels.
    """
    timesteps = _table(T, table)
    return Objective(
        schedule=timesteps,
        preconditioning=PredictNoise(timesteps, timestep_scale=1000 / T),
        weight=EpsWeight(),
        reduce=pixel_mean,
    )


def ImprovedDDPMBound(T: int = 4000, table: Table = "cosine") -> ImportanceSampled:
    """L_vlb with a learned variance and importance-sampled timesteps.

    Args:
        T: number of timesteps.
        table: noise levels.
    """
    timesteps = _table(T, table)
    objective = VariationalBound(
        schedule=timesteps,
        preconditioning=PredictNoise(timesteps, timestep_scale=1000 / T),
        chain=ReverseChain(timesteps, "learned"),
        whole=True,
    )
    return ImportanceSampled(objective, timesteps)


def _table(T: int, name: str) -> Timesteps:
    if name == "cosine":
        return CosineBetas(T)
    if name == "linear":
        return LinearBetas(T, beta_1=1e-4 * 1000 / T, beta_T=0.02 * 1000 / T)
    raise UserError(f"table must be cosine or linear (got {name!r})")
