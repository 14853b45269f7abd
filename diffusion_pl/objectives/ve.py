"""Song's variance-exploding models as EDM has them: Song, Sohl-Dickstein, Kingma, Kumar, Ermon &
Poole, Score-Based Generative Modeling through Stochastic Differential Equations, 2021,
arXiv:2011.13456; the column "VE" of Table 1 of Karras 2022, arXiv:2206.00364.

| part | formula | where |
|---|---|---|
| noise levels | ln sigma ~ U(ln sigma_min, ln sigma_max) | Table 1 |
| c_skip, c_out, c_in | 1, sigma, 1 | Table 1 |
| c_noise | ln(sigma / 2) | Table 1 |
| weight | 1 / sigma^2 | Table 1 |
| sigma_min, sigma_max | 0.02, 100: Song's 0.01 and 50 are of images in [0, 1] | App. C.2.2 |
| pooling | sum over channels and pixels, mean over images | released code |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import EpsWeight, Objective, pixel_sum
from diffusion_pl.diffusion.preconditioning import Coefficients
from diffusion_pl.diffusion.schedules import LogUniform


@dataclass(frozen=True)
class NoiseUnscaled:
    """The preconditioning of a network that predicts -eps from the state as it is.

    Args:
        sigma_min: lowest level that the network is trained at.
        sigma_max: highest level.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The levels of training."""
        return self.sigma_min, self.sigma_max

    def __call__(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            c_skip=torch.ones_like(sigma),
            c_out=sigma,
            c_in=torch.ones_like(sigma),
            c_noise=torch.log(sigma / 2),
        )


def VE(sigma_min: float = 0.02, sigma_max: float = 100.0) -> Objective:
    """The VE objective, with the paper's symbols as arguments.

    Args:
        sigma_min: lowest level in training, > 0.
        sigma_max: highest level in training.
    """
    return Objective(
        schedule=LogUniform(sigma_min, sigma_max),
        preconditioning=NoiseUnscaled(sigma_min, sigma_max),
        weight=EpsWeight(),
        reduce=pixel_sum,
    )
