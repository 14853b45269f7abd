"""What networks of others predict from x_t, by timestep, beside Ho's noise.

| prediction_type | D(x; sigma), x_t = x / sqrt(1 + sigma^2) | here |
|---|---|---|
| epsilon | x - sigma F | `objectives.ddpm.PredictNoise` |
| v_prediction | x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) F | `PredictVelocity` |
| sample | F | `PredictImage` |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_pl.diffusion.preconditioning import Coefficients
from diffusion_pl.diffusion.timesteps import Timesteps
from diffusion_pl.objectives.ddpm import PredictNoise


@dataclass(frozen=True)
class PredictVelocity:
    """A network that predicts v = alpha eps - sigma' x_0 from x_t, by timestep (Salimans 2022).

    alpha^2 + sigma'^2 = 1; v-prediction is EDM's preconditioning with sigma_data = 1, c_out < 0.
    """

    timesteps: Timesteps

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The first and the last timestep's level."""
        return PredictNoise(self.timesteps).sigma_range

    def __call__(self, sigma: Tensor) -> Coefficients:
        alpha = (1 + sigma.square()).rsqrt()
        return Coefficients(
            c_skip=alpha.square(),
            c_out=-sigma * alpha,
            c_in=alpha,
            c_noise=self.timesteps.timestep(sigma),
        )


@dataclass(frozen=True)
class PredictImage:
    """A network that predicts the clean image x_0 from x_t, by timestep."""

    timesteps: Timesteps

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The first and the last timestep's level."""
        return PredictNoise(self.timesteps).sigma_range

    def __call__(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            c_skip=torch.zeros_like(sigma),
            c_out=torch.ones_like(sigma),
            c_in=(1 + sigma.square()).rsqrt(),
            c_noise=self.timesteps.timestep(sigma),
        )
