"""Which quantiles of a schedule a sampler visits, above all which timesteps of a table.

Read a `Timesteps` table of the same T: `levels(LinearBetas(), 50, DDIMUniform())`.

| spacing | timesteps | where |
|---|---|---|
| DDIMUniform | 0, T / S, 2 T / S, ... | Song 2021 (DDIM), App. D.2 |
| Trailing | T - 1, T - 1 - T / S, ... rounded | Lin 2024 (arXiv:2305.08891), Table 2 |
| DDIMQuadratic | floor( linspace(0, sqrt(0.8 T), S)^2 ) | the same, for CIFAR-10 |
| Respaced | round( linspace(0, T - 1, S) ) | Nichol & Dhariwal 2021, section 4 |
| EqualSteps | no table: 1, 1 - 1 / S, ..., 1 / S | Li & He 2025, Table 9 |
| IDDPMSteps | T - 1 - floor( j_0 + (T - 1 - j_0) i / (S - 1) ) | Karras 2022, Table 1 |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_pl.diffusion.schedules import MOST_STEPS
from diffusion_pl.errors import UserError


def _quantiles(timesteps: Tensor, T: int) -> Tensor:
    """The middles of the timesteps' quantiles, so that no rounding leads to a neighbour."""
    return (timesteps + 0.5) / T


def _check(name: str, steps: int, T: int) -> None:
    if not 2 <= steps <= T:
        raise UserError(f"{name}: needs 2 to {T} steps (got {steps})")


@dataclass(frozen=True)
class DDIMUniform:
    """Every (T / S)-th timestep from 0 on; the first T / S - 1 at the noise end are left out.

    Args:
        T: number of timesteps of the table.
        offset: added to every timestep, below T / S.
    """

    T: int = 1000
    offset: int = 0

    def __call__(self, steps: int) -> Tensor:
        """Quantiles, float64 (steps,), decreasing.

        Raises:
            UserError: fewer than 2 steps, or T is no multiple of them.
        """
        _check("DDIMUniform", steps, self.T)
        if self.T % steps:
            raise UserError(
                f"DDIMUniform: {steps} steps do not divide {self.T} timesteps; take a divisor"
            )
        stride = self.T // steps
        if not 0 <= self.offset < stride:
            raise UserError(f"DDIMUniform: offset must be below {stride} (got {self.offset})")
        timesteps = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * stride + self.offset
        return _quantiles(timesteps, self.T)


@dataclass(frozen=True)
class Trailing:
    """Every (T / S)-th timestep from the last on, rounded; the first at the image end are left out.

    Args:
        T: number of timesteps of the table.
    """

    T: int = 1000

    def __call__(self, steps: int) -> Tensor:
        """Quantiles, float64 (steps,), decreasing.

        Raises:
            UserError: fewer than 1 step, or more than T.
        """
        if not 1 <= steps <= self.T:
            raise UserError(f"Trailing: needs 1 to {self.T} steps (got {steps})")
        left = self.T - torch.arange(steps, dtype=torch.float64) * (self.T / steps)
        return _quantiles(left.round() - 1, self.T)


@dataclass(frozen=True)
class DDIMQuadratic:
    """Timesteps denser towards the image; those that coincide are visited once."""

    T: int = 1000

    def __call__(self, steps: int) -> Tensor:
        """Quantiles, float64 (at most steps,), decreasing.

        Raises:
            UserError: fewer than 2 steps, or more than T.
        """
        _check("DDIMQuadratic", steps, self.T)
        k = torch.arange(steps, dtype=torch.float64)
        squares = k.square() * (0.8 * self.T) / (steps - 1) ** 2
        return _quantiles(squares.floor().unique().flip(0), self.T)


@dataclass(frozen=True)
class Respaced:
    """Timesteps evenly spaced between the first and the last, both included, rounded."""

    T: int = 1000

    def __call__(self, steps: int) -> Tensor:
        """Quantiles, float64 (steps,), decreasing.

        Raises:
            UserError: fewer than 2 steps, or more than T.
        """
        _check("Respaced", steps, self.T)
        return _quantiles(torch.linspace(self.T - 1, 0, steps, dtype=torch.float64).round(), self.T)


@dataclass(frozen=True)
class IDDPMSteps:
    """The iDDPM column of EDM's Table 1; j counts from the noise end.

    Args:
        T: M of the paper.
        j_0: the first j; 8 begins at sigma = 80.2.
        j_last: the last j, for networks that know no lower level; None for T - 1.
        rounded: round the steps of j to the nearest, as the released sampler does, instead of the
            paper's floor.
    """

    T: int = 1000
    j_0: int = 8
    j_last: int | None = None
    rounded: bool = False

    def __call__(self, steps: int) -> Tensor:
        """Quantiles, float64 (steps,), decreasing.

        Raises:
            UserError: fewer than 2 steps, or more than there are timesteps from j_0 to j_last.
        """
        last = self.T - 1 if self.j_last is None else self.j_last
        _check("IDDPMSteps", steps, last - self.j_0 + 1)
        span, i = last - self.j_0, torch.arange(steps, dtype=torch.int64)
        # The floor in integers: a quotient rounded to floating point may fall below the last j.
        floor, share = span * i // (steps - 1), span * i.to(torch.float64) / (steps - 1)
        j = self.j_0 + (share.round() if self.rounded else floor.to(torch.float64))
        return _quantiles(self.T - 1 - j, self.T)


@dataclass(frozen=True)
class EqualSteps:
    """Steps of equal length, the last one from u = 1 / S to the end of all noise.

    With `paths.Along(rectified_flow.Straight(shift=s), 0, 1)` they are equal steps of t from pure
    noise, where sigma is infinite: the first quantile is a little below 1.

    Args:
        edge: of the first quantile from 1; at 1e-6 JiT's end points are moved by 4e-7.
    """

    edge: float = 1e-6

    def __call__(self, steps: int) -> Tensor:
        """Quantiles, float64 (steps,), decreasing.

        Raises:
            UserError: fewer than 1 step.
        """
        if not 1 <= steps <= MOST_STEPS:
            raise UserError(f"EqualSteps: needs 1 to {MOST_STEPS:,} steps (got {steps:,})")
        left = 1 - torch.arange(steps, dtype=torch.float64) / steps
        return left.clamp(max=1 - self.edge)
