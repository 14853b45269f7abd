"""Resampling: steps taken several times, with noise added in between.

Lugmayr 2022 (RePaint), arXiv:2201.09865, Algorithm 1: after a jump down the state is noised back to
the jump's start and taken down again, U times in all. With a denoiser that is told a part of the
image (`diffusion.inverse`) the rest has time to agree with it. In the state x + sigma eps the jump
back is noise of variance sigma^2 - s^2, whatever the chain's betas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.errors import UserError
from diffusion_pl.samplers.sampler import Integrator


@dataclass(frozen=True)
class Resampled:
    """An `Integrator` that takes each of its jumps several times.

    A multistep method begins anew in each jump; churn is shared among the steps of one.

    Args:
        integrate: the algorithm within a jump.
        repeats: how often a jump is taken, U; 1 changes nothing but where multistep methods begin.
        jump: its steps, at least 1; RePaint's is 10 of 250, U = 10.
    """

    integrate: Integrator
    repeats: int = 10
    jump: int = 1

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.jump < 1:
            raise UserError(
                f"repeats and jump must be at least 1 (got {self.repeats}, {self.jump})"
            )

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        randn_like: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """As every `Integrator`; `repeats` times its evaluations."""
        for first in range(0, len(sigmas) - 1, self.jump):
            part = sigmas[first : first + self.jump + 1]
            back = math.sqrt(float(part[0]) ** 2 - float(part[-1]) ** 2)
            for _ in range(self.repeats - 1):
                x = self.integrate(denoise, x, part, randn_like)
                x = x + back * randn_like(x)
            x = self.integrate(denoise, x, part, randn_like)
        return x
