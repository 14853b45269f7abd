"""The exponential Adams-Bashforth rule of three values, deterministic and stochastic: order 3.

Hochbruck & Ostermann, Exponential integrators, Acta Numerica 2010, section 2.5, on the solution of
dpm_solver.py, with D the parabola in lambda = -ln sigma through its last three values, integrated
exactly. With tau the share of the step and g = (1 + eta) h,

    x_s = e^(-g) x + sum_m w_m D_m + s sqrt(1 - e^(-2 eta h)) z ,
    w_m = integral from 0 to 1 of l_m(tau) g e^(-g (1 - tau)) d tau .

The sum of the weights is 1 - e^(-g). DPM-Solver++(3M) as it was released differs from it in one
coefficient; see dpm_solver.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.samplers.dpm_solver import multistep
from diffusion_pl.samplers.quadrature import exponential_weights


def exponential_adams(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    *,
    eta: float = 0.0,
) -> Tensor:
    """Integrate with one evaluation a step; order 3. Arguments as for `multistep`."""
    return multistep(_weights, denoise, x, sigmas, randn_like, eta=eta)


def _weights(levels: Sequence[float], length: float, g: float) -> list[float]:
    newest, *_ = logs = [math.log(level) for level in levels]
    return exponential_weights([(newest - log) / length for log in logs], g)
