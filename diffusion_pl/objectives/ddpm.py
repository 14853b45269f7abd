"""DDPM: Ho, Jain & Abbeel, Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239.

| part | formula | where |
|---|---|---|
| noise levels | beta_t linear, alpha_bar_t = prod (1 - beta_s), t uniform | App. B, Eq. 4 |
| c_skip, c_out | 1, -sigma: D = x - sigma eps_theta, the x_0 of Eq. 15 | Eq. 15 |
| c_in | 1 / sqrt(1 + sigma^2): the network sees x_t of Ho's own scale | Eq. 4 |
| c_noise | the timestep, 0 (diffused one step) to T - 1 | released code |
| weight | 1 / sigma^2, the squared error of eps | Eq. 14, L_simple |
| pooling | mean over channels and pixels | released code |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_pl.diffusion.levels import sigma_from_alpha_bar
from diffusion_pl.diffusion.objective import NoiseError, Objective, pixel_mean
from diffusion_pl.diffusion.preconditioning import Coefficients


@dataclass(frozen=True)
class LinearBetas:
    """DDPM's T noise levels as a schedule: quantile u falls on timestep floor(u T).

    Args:
        T: number of timesteps, at least 2.
        beta_1: variance added by the first step.
        beta_T: variance added by the last step.
    """

    T: int = 1000
    beta_1: float = 1e-4
    beta_T: float = 0.02

    def __post_init__(self) -> None:
        if self.T < 2 or not 0 < self.beta_1 <= self.beta_T < 1:
            raise ValueError(
                "T must be at least 2 and 0 < beta_1 <= beta_T < 1 "
                f"(got T={self.T}, beta_1={self.beta_1}, beta_T={self.beta_T})"
            )

    def betas(self, device: torch.device | str = "cpu") -> Tensor:
        """beta_1 .. beta_T, float64 (T,)."""
        return torch.linspace(self.beta_1, self.beta_T, self.T, dtype=torch.float64, device=device)

    def sigmas(self, device: torch.device | str = "cpu") -> Tensor:
        """The level of each timestep, increasing, float64 (T,)."""
        return sigma_from_alpha_bar(torch.cumprod(1 - self.betas(device), dim=0))

    def __call__(self, u: Tensor) -> Tensor:
        index = (u * self.T).floor().long().clamp(0, self.T - 1)
        return self.sigmas(u.device)[index]

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep of a level, so that any sampler can drive a DDPM network.

        Exact on the table; in between, linear in ln sigma; clamped to 0 .. T - 1 outside.

        Args:
            sigma: levels > 0, any shape; float64 to hit the table exactly.

        Returns:
            float64 of the same shape, in [0, T - 1].
        """
        table = self.sigmas(sigma.device).log()
        level = sigma.to(torch.float64).log()
        # The table came through the same logarithm, so a level on it lands on a whole timestep.
        upper = torch.searchsorted(table, level.contiguous()).clamp(1, self.T - 1)
        lower = upper - 1
        fraction = (level - table[lower]) / (table[upper] - table[lower])
        return (lower + fraction).clamp(0, self.T - 1)


@dataclass(frozen=True)
class PredictNoise:
    """The preconditioning of a network that predicts eps from the variance-preserving state x_t."""

    timesteps: LinearBetas

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The first and the last timestep's level."""
        sigmas = self.timesteps.sigmas()
        return float(sigmas[0]), float(sigmas[-1])

    def __call__(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            c_skip=torch.ones_like(sigma),
            c_out=-sigma,
            c_in=(1 + sigma.square()).rsqrt(),
            c_noise=self.timesteps.timestep(sigma),
        )


def DDPM(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Objective:
    """L_simple of Ho 2020, Eq. 14, with the paper's symbols as arguments.

    Args:
        T: number of timesteps.
        beta_1: variance added by the first step.
        beta_T: variance added by the last step.
    """
    timesteps = LinearBetas(T, beta_1, beta_T)
    return Objective(
        schedule=timesteps,
        preconditioning=PredictNoise(timesteps),
        weight=NoiseError(),
        reduce=pixel_mean,
    )
