"""Improved DDPM's models as EDM has them: Nichol & Dhariwal, Improved Denoising Diffusion
Probabilistic Models, 2021, arXiv:2102.09672; the column "iDDPM + DDIM" of Table 1 of Karras 2022,
arXiv:2206.00364.

| part | formula | where |
|---|---|---|
| levels | u_{j-1} = sqrt( (u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1) - 1 ), u_M = 0 | Table 1 |
| abar_j | sin^2( pi / 2 j / (M (C_2 + 1)) ) | Table 1 |
| noise levels | u_j, j ~ U{0 .. M - 1} | Table 1 |
| c_skip, c_out, c_in | 1, -sigma, 1 / sqrt(sigma^2 + 1) | Table 1 |
| c_noise | M - 1 - argmin_j abs(u_j - sigma) | released code; Table 1 prints argmin_j |
| weight | 1 / sigma^2; L_vlb is left out | Table 1 |
| pooling | sum over channels and pixels, mean over images | released code |

j counts from the noise. u_j is the cosine table of Nichol & Dhariwal counted the other way, with
s = C_2 and betas up to 1 - C_1, so M - 1 - j is their timestep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import EpsWeight, Objective, pixel_sum
from diffusion_pl.diffusion.preconditioning import Coefficients
from diffusion_pl.diffusion.schedules import Rho, Schedule
from diffusion_pl.diffusion.timesteps import CosineBetas, Timesteps


@dataclass(frozen=True)
class NoiseOnTable:
    """The preconditioning of a network that predicts eps and knows only the levels of a table.

    Args:
        timesteps: the table.
    """

    timesteps: Timesteps

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The first and the last timestep's level."""
        return self.timesteps.sigma_range

    def __call__(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            c_skip=torch.ones_like(sigma),
            c_out=-sigma,
            c_in=(1 + sigma.square()).rsqrt(),
            c_noise=self.index(sigma).to(sigma.dtype),
        )

    def index(self, sigma: Tensor) -> Tensor:
        """The timestep whose level lies nearest, int64 of sigma's shape."""
        table = self.timesteps.sigmas(sigma.device)
        between = (table[1:] + table[:-1]) / 2
        return torch.searchsorted(between, sigma.to(torch.float64).contiguous())

    def nearest(self, sigma: float) -> float:
        """The level of the table nearest to a level."""
        return float(self.timesteps.sigmas()[self.index(torch.tensor(sigma, dtype=torch.float64))])


@dataclass(frozen=True)
class Rounded:
    """A schedule whose levels are rounded to a table, as EDM samples a network of discrete levels.

    Args:
        schedule: u -> sigma.
        timesteps: the table.
    """

    schedule: Schedule
    timesteps: Timesteps

    def __call__(self, u: Tensor) -> Tensor:
        index = NoiseOnTable(self.timesteps).index(self.schedule(u))
        return self.timesteps.sigmas(u.device)[index]


def RoundedRho(
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    *,
    M: int = 1000,
    C_1: float = 0.001,
    C_2: float = 0.008,
) -> Rounded:
    """EDM's sampling levels, kept within the table and rounded to it (Karras 2022, App. D.1).

    Args:
        sigma_min: lowest level, raised to the table's.
        sigma_max: highest level, lowered to the table's.
        rho: of the spacing.
        M: as for `IDDPM`.
        C_1: likewise.
        C_2: likewise.
    """
    table = CosineBetas(M, offset=C_2, largest=1 - C_1)
    low, high = NoiseOnTable(table).sigma_range
    return Rounded(Rho(max(sigma_min, low), min(sigma_max, high), rho), table)


def nearest(sigma: float, *, M: int = 1000, C_1: float = 0.001, C_2: float = 0.008) -> float:
    """The level of the table nearest to a level, for `heun`'s churn.

    Args:
        sigma: any level.
        M: as for `IDDPM`.
        C_1: likewise.
        C_2: likewise.
    """
    return NoiseOnTable(CosineBetas(M, offset=C_2, largest=1 - C_1)).nearest(sigma)


def IDDPM(M: int = 1000, C_1: float = 0.001, C_2: float = 0.008) -> Objective:
    """The iDDPM objective, with the paper's symbols as arguments.

    Args:
        M: number of levels, at least 2.
        C_1: smallest share of the signal that a step keeps, abar_{j-1} / abar_j.
        C_2: offset of the cosine, > 0.
    """
    table = CosineBetas(M, offset=C_2, largest=1 - C_1)
    return Objective(
        schedule=table,
        preconditioning=NoiseOnTable(table),
        weight=EpsWeight(),
        reduce=pixel_sum,
    )
