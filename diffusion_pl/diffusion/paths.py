"""Noise as a function of time, sigma(t): the ODEs of Song 2021 in Karras 2022's form (Table 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion_pl.errors import UserError


class Path(Protocol):
    """An increasing sigma(t) with its derivative and its inverse, element by element."""

    def sigma(self, t: Tensor) -> Tensor:
        """The noise level at time t."""

    def slope(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    def time(self, sigma: Tensor) -> Tensor:
        """The time of a noise level."""


@dataclass(frozen=True)
class VariancePreserving:
    """sigma(t) = sqrt( exp(beta_d t^2 / 2 + beta_min t) - 1 ) (Karras 2022, Table 1, "VP").

    Args:
        beta_d: slope of the noise rate, > 0.
        beta_min: noise rate at t = 0, > 0.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1

    def __post_init__(self) -> None:
        if self.beta_d <= 0 or self.beta_min <= 0:
            raise UserError(
                f"beta_d and beta_min must be positive (got {self.beta_d} and {self.beta_min})"
            )

    def sigma(self, t: Tensor) -> Tensor:
        return torch.expm1(self.beta_d / 2 * t.square() + self.beta_min * t).sqrt()

    def slope(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return (self.beta_d * t + self.beta_min) / 2 * (sigma + 1 / sigma)

    def time(self, sigma: Tensor) -> Tensor:
        root = torch.sqrt(self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma.square()))
        return (root - self.beta_min) / self.beta_d


def preserving_between(
    sigma_min: float, sigma_max: float, epsilon_s: float = 1e-3
) -> VariancePreserving:
    """The path with sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max, for narrower networks.

    With l = ln(1 + sigma^2) at either end, beta_d / 2 t^2 + beta_min t = l solved for both.

    Args:
        sigma_min: level at t = epsilon_s.
        sigma_max: level at t = 1.
        epsilon_s: the last time before 0.
    """
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
    return VariancePreserving(beta_d, high - beta_d / 2)


@dataclass(frozen=True)
class VarianceExploding:
    """sigma(t) = sqrt(t) (Karras 2022, Table 1, "VE")."""

    def sigma(self, t: Tensor) -> Tensor:
        return t.sqrt()

    def slope(self, t: Tensor) -> Tensor:
        return 1 / (2 * t.sqrt())

    def time(self, sigma: Tensor) -> Tensor:
        return sigma.square()


@dataclass(frozen=True)
class Linear:
    """sigma(t) = t (Karras 2022, Table 1, "DDIM" and "Ours")."""

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def slope(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, sigma: Tensor) -> Tensor:
        return sigma


@dataclass(frozen=True)
class Along:
    """A schedule that is uniform in the time of a path: u -> sigma(start + u (end - start)).

    Args:
        path: sigma(t).
        start: time at u = 0.
        end: time at u = 1, > start.
    """

    path: Path
    start: float
    end: float = 1.0

    def __post_init__(self) -> None:
        if not self.start < self.end:
            raise UserError(f"start must lie below end (got {self.start} and {self.end})")

    def __call__(self, u: Tensor) -> Tensor:
        return self.path.sigma(self.start + u * (self.end - self.start))
