"""Tables of discrete noise levels: T timesteps as a schedule (Ho 2020; Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_pl.diffusion.levels import sigma_from_alpha_bar
from diffusion_pl.errors import UserError

# Of a table whose length a file of others may say; any that was published has 4,000 at most.
MOST = 1_000_000


@dataclass(frozen=True, eq=False)
class Timesteps:
    """T noise levels, made from the variance that each step adds; u falls on timestep floor(u T).

    Args:
        betas: beta_1 .. beta_T, float64 (T,), each in (0, 1).

    Raises:
        UserError: fewer than 2 steps, or a beta outside (0, 1).
    """

    betas: Tensor

    def __post_init__(self) -> None:
        if len(self.betas) < 2 or not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise UserError(
                f"a table needs at least 2 betas, all between 0 and 1 (got {self.betas.tolist()})"
            )

    @property
    def T(self) -> int:
        """The number of timesteps."""
        return len(self.betas)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The first and the last timestep's level."""
        sigmas = self.sigmas()
        return float(sigmas[0]), float(sigmas[-1])

    def sigmas(self, device: torch.device | str = "cpu") -> Tensor:
        """The level of each timestep, 0 (diffused one step) first: increasing, float64 (T,)."""
        return sigma_from_alpha_bar(torch.cumprod(1 - self.betas.to(device), dim=0))

    def __call__(self, u: Tensor) -> Tensor:
        return self.sigmas(u.device)[self.index(u)]

    def index(self, u: Tensor) -> Tensor:
        """The timestep of a quantile, floor(u T): int64 in 0 .. T - 1."""
        return (u * self.T).floor().long().clamp(0, self.T - 1)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep of a level, so that any sampler can drive a network of this table.

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


def _check_length(T: int) -> None:
    if T > MOST:
        raise UserError(f"T must be at most {MOST:,} timesteps (got {T:,})")


def LinearBetas(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Timesteps:
    """DDPM's table: betas linear from the first to the last, both included (Ho 2020, App. B).

    Args:
        T: number of timesteps, at least 2.
        beta_1: variance added by the first step.
        beta_T: variance added by the last step.
    """
    _check_length(T)
    if T < 2 or not 0 < beta_1 <= beta_T < 1:
        raise UserError(
            "T must be at least 2 and 0 < beta_1 <= beta_T < 1 "
            f"(got T={T}, beta_1={beta_1}, beta_T={beta_T})"
        )
    return Timesteps(torch.linspace(beta_1, beta_T, T, dtype=torch.float64))


def CosineBetas(T: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Timesteps:
    """Improved DDPM's table (Nichol & Dhariwal 2021, Eq. 17).

    alpha_bar(u) is proportional to cos^2( (u + offset) / (1 + offset) pi / 2 ), and
    beta_t = min(1 - alpha_bar(t / T) / alpha_bar((t - 1) / T), largest).

    Args:
        T: number of timesteps, at least 2.
        offset: s of the paper, keeps the first betas from vanishing.
        largest: bound of beta at the noise end.
    """
    _check_length(T)
    if T < 2 or offset <= 0 or not 0 < largest < 1:
        raise UserError(
            "T must be at least 2, offset positive and largest between 0 and 1 "
            f"(got T={T}, offset={offset}, largest={largest})"
        )
    u = torch.linspace(0.0, 1.0, T + 1, dtype=torch.float64)
    alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2).square()
    return Timesteps((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=largest))


def ScaledLinearBetas(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Timesteps:
    """Betas whose square roots are linear (Rombach 2022, released code).

    Args:
        T: number of timesteps, at least 2.
        beta_1: variance added by the first step.
        beta_T: variance added by the last step.
    """
    roots = LinearBetas(T, math.sqrt(beta_1), math.sqrt(beta_T)).betas
    return Timesteps(roots.square())


def SigmoidBetas(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Timesteps:
    """Betas on a sigmoid from -6 to 6 between two limits (Xu 2022, GeoDiff, released code).

    Args:
        T: number of timesteps, at least 2.
        beta_1: lower limit.
        beta_T: upper limit.
    """
    _check_length(T)
    share = torch.sigmoid(torch.linspace(-6.0, 6.0, T, dtype=torch.float64))
    return Timesteps(beta_1 + share * (beta_T - beta_1))


def LaplaceBetas(T: int = 1000, largest: float = 0.999) -> Timesteps:
    """Betas of alpha_bar(u) = sqrt( s / (1 + s) ), ln s = -sign(1/2 - u) ln(1 - 2 |1/2 - u|) / 2.

    The diffusers library's "laplace", after Hang 2024 (arXiv:2407.03297); its 1e-6 keeps the
    logarithm finite at the ends.

    Args:
        T: number of timesteps, at least 2.
        largest: bound of beta at the noise end.
    """
    _check_length(T)
    u = torch.linspace(0.0, 1.0, T + 1, dtype=torch.float64)
    middle = 0.5 - u
    side = torch.where(middle < 0, -1.0, 1.0)
    signal = torch.exp(-0.5 * side * torch.log(1 - 2 * middle.abs() + 1e-6))
    alpha_bar = torch.sqrt(signal / (1 + signal))
    return Timesteps((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=largest))


def Betas(betas: Sequence[float]) -> Timesteps:
    """A table of which every beta is given, as some checkpoints come with.

    Args:
        betas: beta_1 .. beta_T, each in (0, 1).
    """
    return Timesteps(torch.tensor(list(betas), dtype=torch.float64))


def ZeroTerminal(timesteps: Timesteps, last: float = 1e-12) -> Timesteps:
    """A table whose last timestep keeps nothing of the image (Lin 2024, arXiv:2305.08891, Alg. 1).

    sqrt(alpha_bar) is shifted to end at 0 and stretched to begin where it did. At alpha_bar = 0
    sigma is infinite; `last` stands in for it, 1e-6 of the image where the paper has none.

    Args:
        timesteps: the table to change.
        last: alpha_bar of the last timestep, > 0.
    """
    root = torch.cumprod(1 - timesteps.betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = torch.cat([root.square()[:-1], torch.tensor([last], dtype=torch.float64)])
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return Timesteps(1 - alpha_bar / before)
