"""Schedules: increasing maps from a quantile u in [0, 1] to a noise level sigma.

A schedule serves twice. Training draws u uniformly, so the schedule is the inverse CDF of the
training noise distribution; sampling walks u from 1 down to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion_pl.errors import UserError


class Schedule(Protocol):
    """Any increasing map u in [0, 1] -> sigma, element by element."""

    def __call__(self, u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ N(mean, std^2), EDM's training distribution (Karras 2022, Table 1).

    Args:
        mean: P_mean, of ln sigma.
        std: P_std > 0, of ln sigma.
        tail: probability cut off at either end, so that u = 0 and u = 1 give finite levels.
    """

    mean: float
    std: float
    tail: float = 1e-7

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise UserError(f"std must be positive (got {self.std})")

    def __call__(self, u: Tensor) -> Tensor:
        return torch.exp(
            self.mean + self.std * torch.special.ndtri(u.clamp(self.tail, 1 - self.tail))
        )


@dataclass(frozen=True)
class Rho:
    """The sampling levels of EDM: uniform in sigma^(1/rho) (Karras 2022, Eq. 5).

    Args:
        sigma_min: level at u = 0, > 0.
        sigma_max: level at u = 1, > sigma_min.
        rho: 7 in the paper; 1 is uniform in sigma, towards infinity uniform in ln sigma.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                "sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max "
                f"(got {self.sigma_min} and {self.sigma_max})"
            )
        if not 0 < self.rho < math.inf:
            raise UserError(f"rho must be positive and finite (got {self.rho})")

    def __call__(self, u: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + u * (high - low)) ** self.rho


@dataclass(frozen=True)
class LogUniform:
    """Uniform in ln sigma between two levels."""

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                "sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max "
                f"(got {self.sigma_min} and {self.sigma_max})"
            )

    def __call__(self, u: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(u * math.log(self.sigma_max / self.sigma_min))


Spacing = Callable[[int], Tensor]
MOST_STEPS = 1_000_000  # a config of others may ask for any number


def uniform(steps: int) -> Tensor:
    """Quantiles from 1 down to 0, both included: u_i = 1 - i / (steps - 1).

    Args:
        steps: how many levels, at least 1.

    Returns:
        float64 (steps,), decreasing; a single step starts at u = 1.

    Raises:
        UserError: fewer than one step.
    """
    if steps < 1:
        raise UserError(f"a sampler needs at least 1 step (got {steps})")
    if steps > MOST_STEPS:
        raise UserError(f"a sampler takes at most {MOST_STEPS:,} steps (got {steps:,})")
    return torch.linspace(1.0, 0.0, steps, dtype=torch.float64)


def levels(schedule: Schedule, steps: int, spacing: Spacing = uniform) -> Tensor:
    """The levels a sampler visits: the schedule at the spacing's quantiles, then sigma = 0.

    Returns:
        float64 (steps + 1,), strictly decreasing, the last one 0.

    Raises:
        UserError: the levels do not decrease, as when a table of T is asked for more.
    """
    sigmas = torch.cat([schedule(spacing(steps)), torch.zeros(1, dtype=torch.float64)])
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise UserError(
            f"the schedule gives no {steps} different noise levels; ask for fewer steps"
        )
    return sigmas
