"""Song's variance-preserving models as EDM has them: Song, Sohl-Dickstein, Kingma, Kumar, Ermon &
Poole, Score-Based Generative Modeling through Stochastic Differential Equations, 2021,
arXiv:2011.13456; the column "VP" of Table 1 of Karras 2022, arXiv:2206.00364.

| part | formula | where |
|---|---|---|
| noise levels | sigma^-1(sigma) ~ U(epsilon_t, 1) | Table 1 |
| sigma(t) | sqrt( exp(beta_d t^2 / 2 + beta_min t) - 1 ) | Table 1 |
| c_skip, c_out, c_in | 1, -sigma, 1 / sqrt(sigma^2 + 1) | Table 1 |
| c_noise | (M - 1) sigma^-1(sigma) | Table 1 |
| weight | 1 / sigma^2 | Table 1 |
| pooling | sum over channels and pixels, mean over images | released code |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import EpsWeight, Objective, pixel_sum
from diffusion_pl.diffusion.paths import Along, VariancePreserving
from diffusion_pl.diffusion.preconditioning import Coefficients


@dataclass(frozen=True)
class NoiseInTime:
    """The preconditioning of a network that predicts eps from the scaled state and the time.

    Args:
        path: sigma(t).
        M: c_noise counts time in 1 / (M - 1), as if there were M discrete levels.
        epsilon_t: the earliest time that the network is trained at.
    """

    path: VariancePreserving
    M: int = 1000
    epsilon_t: float = 1e-5

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The levels of the first and the last time."""
        ends = self.path.sigma(torch.tensor([self.epsilon_t, 1.0], dtype=torch.float64))
        return float(ends[0]), float(ends[1])

    def __call__(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            c_skip=torch.ones_like(sigma),
            c_out=-sigma,
            c_in=(1 + sigma.square()).rsqrt(),
            c_noise=(self.M - 1) * self.path.time(sigma),
        )


def VP(
    beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000, epsilon_t: float = 1e-5
) -> Objective:
    """The VP objective, with the paper's symbols as arguments.

    Args:
        beta_d: slope of the noise rate, > 0.
        beta_min: noise rate at t = 0, > 0.
        M: of c_noise.
        epsilon_t: earliest time in training, in (0, 1).
    """
    path = VariancePreserving(beta_d, beta_min)
    return Objective(
        schedule=Along(path, epsilon_t),
        preconditioning=NoiseInTime(path, M, epsilon_t),
        weight=EpsWeight(),
        reduce=pixel_sum,
    )
