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

from diffusion_pl.diffusion.objective import NoiseError, Objective, pixel_mean
from diffusion_pl.diffusion.preconditioning import Coefficients
from diffusion_pl.diffusion.timesteps import LinearBetas, Timesteps


@dataclass(frozen=True)
class PredictNoise:
    """The preconditioning of a network that predicts eps from the variance-preserving state x_t."""

    timesteps: Timesteps

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
