"""Ground truth: data distributions whose denoiser and probability-flow ODE are known exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """x ~ N(mean, std^2) in every pixel, independently."""

    mean: float = 0.0
    std: float = 0.5

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The posterior mean of x given x + sigma eps."""
        level = sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma
        share = self.std**2 / (self.std**2 + level.square())
        return self.mean + share * (x - self.mean)

    def flow(self, x: Tensor, sigma: float, to: float) -> Tensor:
        """The exact solution of the probability-flow ODE from one level to another."""
        ratio = math.sqrt((self.std**2 + to**2) / (self.std**2 + sigma**2))
        return self.mean + ratio * (x - self.mean)


@dataclass(frozen=True)
class Mixture:
    """An equal mixture of Gaussians of one std around points on the real line, in every pixel."""

    centres: tuple[float, ...] = (-0.8, 0.1, 0.7)
    std: float = 0.1

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The posterior mean: each component's, weighted by how likely it made x."""
        level = sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma
        centres = x.new_tensor(self.centres)
        variance = (self.std**2 + level.square())[..., None]
        offset = x[..., None] - centres
        weight = torch.softmax(-offset.square() / (2 * variance), dim=-1)
        mean = centres + self.std**2 / variance * offset
        return (weight * mean).sum(-1)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw pixels."""
        which = torch.randint(len(self.centres), shape, generator=generator)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.tensor(self.centres, dtype=torch.float64)[which] + self.std * noise

    def cdf(self, x: Tensor) -> Tensor:
        """Cumulative distribution of a pixel."""
        z = (x[..., None] - torch.tensor(self.centres, dtype=x.dtype)) / self.std
        return torch.special.ndtr(z).mean(-1)

    def flow(self, x: Tensor, sigma: float, to: float) -> Tensor:
        """The exact solution of the probability-flow ODE from one level to another, float64.

        On a line the flow keeps every point's quantile among the noisy data, so the end is where
        the distribution at the last level has the quantile of the start: found by bisection.
        """

        def noisy(at: float) -> Mixture:
            return Mixture(self.centres, math.hypot(self.std, at))

        quantile, end = noisy(sigma).cdf(x), noisy(to)
        low, high = torch.full_like(x, -20.0 - 20 * to), torch.full_like(x, 20.0 + 20 * to)
        for _ in range(80):
            middle = (low + high) / 2
            below = end.cdf(middle) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class Correlated:
    """x ~ N(mean, covariance) over all pixels and channels of an image.

    Args:
        mean: float64 (C, H, W).
        covariance: float64 (C H W, C H W).
    """

    mean: Tensor
    covariance: Tensor

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The posterior mean of x given x + sigma eps."""
        noisy = self.covariance + sigma.square() * torch.eye(len(self.covariance)).to(x)
        offset = (x - self.mean).flatten(1)
        return self.mean + (offset @ torch.linalg.solve(noisy, self.covariance)).view_as(x)

    def given(self, matrix: Tensor, measured: Tensor, std: float) -> Correlated:
        """The distribution given matrix x + std eps = measured, by Gaussian conditioning."""
        eye = torch.eye(len(matrix), dtype=matrix.dtype)
        spread = matrix @ self.covariance @ matrix.T + std**2 * eye
        gain = self.covariance @ matrix.T @ torch.linalg.pinv(spread, hermitian=True)
        residual = measured.flatten() - matrix @ self.mean.flatten()
        mean = self.mean + (gain @ residual).view_as(self.mean)
        return Correlated(mean, self.covariance - gain @ matrix @ self.covariance)
