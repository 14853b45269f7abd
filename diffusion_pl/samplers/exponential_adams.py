"""The exponential Adams-Bashforth rule of three values, deterministic and stochastic: order 3.

Hochbruck & Ostermann, Exponential integrators, Acta Numerica 2010, section 2.5, on the solution of
dpmpp_2m, with D the parabola in lambda = -ln sigma through its last three values, integrated
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
from diffusion_pl.samplers.multistep import multistep
from diffusion_pl.samplers.quadrature import exponential_weights


def exponential_adams(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    *,
    eta: float = 0.0,
) -> Tensor:
    """Integrate from sigmas[0] to sigmas[-1] with one evaluation a step; order 3.

    Args:
        denoise: D, called `denoise(x, sigma)`.
        x: the state at sigmas[0], float64 (B, C, H, W).
        sigmas: decreasing levels, float64 (N + 1,), all but the last > 0.
        randn_like: draws standard normal noise shaped as its argument; not used at eta = 0.
        eta: how much noise is renewed: 0 is the ODE, 1 the reverse SDE.

    Returns:
        The state at sigmas[-1], float64; N evaluations. The first two steps have one and two
        values, the step to sigma = 0 takes D alone and adds no noise.

    Raises:
        UserError: eta negative.
    """
    return multistep(_weights, denoise, x, sigmas, randn_like, eta=eta)


def _weights(levels: Sequence[float], length: float, g: float) -> list[float]:
    newest, *_ = logs = [math.log(level) for level in levels]
    return exponential_weights([(newest - log) / length for log in logs], g)
