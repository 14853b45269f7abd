"""The one training objective that the papers share; what differs are its four parts.

L = E_u  weight(sigma) | D(x + sigma eps; sigma) - x |^2 ,    sigma = schedule(u),  u ~ U(0, 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from diffusion_pl.diffusion.levels import per_image
from diffusion_pl.diffusion.preconditioning import Denoiser, Preconditioning
from diffusion_pl.diffusion.schedules import Schedule

Denoise = Callable[..., Tensor]


class Weight(Protocol):
    """lambda(sigma), the weight of the squared error of the denoised image, element by element."""

    def __call__(self, sigma: Tensor) -> Tensor: ...


# Pools the weighted error of an image, (B, C, H, W) -> (B,); it squares, so that it may also
# average neighbouring errors before.
Reduce = Callable[[Tensor], Tensor]


class TrainingObjective(Protocol):
    """What trains a network: an `Objective`, or anything that answers as one does.

    One that has weights or a memory of its own is an nn.Module too: the run then trains the weights
    beside the network's and keeps all of it in the checkpoints.
    """

    @property
    def schedule(self) -> Schedule:
        """u -> sigma, the inverse CDF of the training noise levels."""

    @property
    def preconditioning(self) -> Preconditioning:
        """The four c's around the network."""

    def denoiser(self, network: nn.Module) -> Denoiser:
        """The denoiser around a raw network."""

    def loss(
        self, denoise: Denoise, image: Tensor, u: Tensor, noise: Tensor, **condition: Tensor | None
    ) -> Tensor:
        """The loss of each image, float32 (B,); see `Objective.loss`."""


class ObjectiveAround(nn.Module):
    """An objective around another, which keeps its levels, preconditioning and denoiser.

    Args:
        objective: what is trained.
    """

    def __init__(self, objective: TrainingObjective) -> None:
        super().__init__()
        self.objective = objective

    @property
    def schedule(self) -> Schedule:
        """The inner objective's."""
        return self.objective.schedule

    @property
    def preconditioning(self) -> Preconditioning:
        """The inner objective's."""
        return self.objective.preconditioning

    def denoiser(self, network: nn.Module) -> Denoiser:
        """The inner objective's."""
        return self.objective.denoiser(network)


# Of a schedule without ends, the share of the training images beyond either end of its range.
TAIL = 1e-6


def trained_range(objective: TrainingObjective) -> tuple[float, float]:
    """The lowest and the highest level that a network of this objective knows.

    They are the network's own limits; where it has none, the levels that training draws, but for
    one image in a million at either end.
    """
    low, high = objective.preconditioning.sigma_range
    ends = torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64)
    lowest, highest = objective.schedule(ends).tolist()
    return (low if low > 0 else lowest), (high if math.isfinite(high) else highest)


@runtime_checkable
class RemembersSteps(Protocol):
    """A module of an objective or a network called around every optimizer step.

    What it sees within a step may take effect only at the step's end; otherwise the number of
    micro-batches of a step would change the run. The averages are moved after that.
    """

    def begin_step(self) -> None:
        """An optimizer step begins."""

    def end_step(self) -> None:
        """All its micro-batches are done."""


@runtime_checkable
class NeedsNetwork(Protocol):
    """A module of an objective that is fitted to the network before training, such as
    `extra.Alignment`; nothing of it is needed to sample.

    Attributes:
        checkpointed: whether it reads what activation checkpointing runs again, once attached.
    """

    checkpointed: bool

    def attach(self, network: nn.Module, resolution: int) -> None:
        """Find what it reads in the network, and make its own weights on torch's default device.

        Args:
            network: the raw F that is trained, or the same on torch's meta device to see that it
                fits.
            resolution: side of a full-resolution image, pixels.

        Raises:
            UserError: the network or its images do not fit.
        """

    def check_weights(self) -> None:
        """Raise UserError unless the files that `load` reads are there."""

    def load(self) -> None:
        """Read the weights of frozen networks; UserError if they are missing or unfit."""

    def begin(self) -> None:
        """The network is about to be called for a loss."""


@runtime_checkable
class Reports(Protocol):
    """An objective that tells parts of its loss apart, for the log."""

    def report(self) -> dict[str, Tensor]:
        """Each part by its name in the log, summed over the images since the last call, ()."""


def needing_network(objective: TrainingObjective) -> list[NeedsNetwork]:
    """The modules of an objective that are fitted to the network before training."""
    modules = objective.modules() if isinstance(objective, nn.Module) else ()
    return [part for part in modules if isinstance(part, NeedsNetwork)]


@dataclass(frozen=True)
class EpsWeight:
    """1 / sigma^2: the squared error of the noise, | eps_hat - eps |^2 (Ho 2020, Eq. 14)."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma.square().reciprocal()


@dataclass(frozen=True)
class UnitOutput:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras 2022, Eq. 8): F's error counts 1.

    Args:
        sigma_data: standard deviation of the images in [-1, 1], > 0.
    """

    sigma_data: float = 0.5

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()


def pixel_sum(error: Tensor) -> Tensor:
    """Sum of squares over channels and pixels, (B, C, H, W) -> (B,): EDM's loss."""
    return error.square().flatten(1).sum(dim=1)


def pixel_mean(error: Tensor) -> Tensor:
    """Mean of squares over channels and pixels, (B, C, H, W) -> (B,): DDPM's loss."""
    return error.square().flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Objective:
    """What a network is trained to do: noise levels, a preconditioning, a weight, a pooling.

    Args:
        schedule: u -> sigma, the inverse CDF of the training noise levels.
        preconditioning: the four c's around the network.
        weight: lambda(sigma) on the squared error of the denoised image.
        reduce: squares the weighted error sqrt(lambda) (D - x) and pools it over an image,
            (B, C, H, W) -> (B,).
    """

    schedule: Schedule
    preconditioning: Preconditioning
    weight: Weight
    reduce: Reduce

    def denoiser(self, network: nn.Module) -> Denoiser:
        """The denoiser that this objective trains around a raw network."""
        return Denoiser(network, self.preconditioning)

    def loss(
        self, denoise: Denoise, image: Tensor, u: Tensor, noise: Tensor, **condition: Tensor | None
    ) -> Tensor:
        """The loss of each image; the caller draws the randomness, so this is a pure function.

        Args:
            denoise: D, called `denoise(x, sigma, **condition)`.
            image: clean images (B, C, H, W) in [-1, 1], float32.
            u: quantiles in [0, 1], (B,), any float dtype; float64 keeps the tails.
            noise: standard normal, (B, C, H, W).
            condition: keyword tensors handed to `denoise` unseen.

        Returns:
            float32 (B,), at least 0.
        """
        sigma = self.schedule(u)
        # float32 from here on: the weight is a factor of the loss, not an accumulated state.
        level = per_image(sigma, image).to(torch.float32)
        denoised = denoise(image + level * noise, sigma, **condition)
        root = per_image(self.weight(sigma).sqrt(), image).to(torch.float32)
        return self.reduce(root * (denoised - image))
