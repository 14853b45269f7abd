"""DPM-Solver++(3M) as the field runs it, deterministic and stochastic: Lu et al. 2022,
arXiv:2211.01095; the coefficients are those of the released multistep code.

The solution is that of dpmpp_2m. With h the step in lambda = -ln sigma, r_0 and r_1 the lengths of
the step before and of the one before that in units of h, and g = (1 + eta) h,

    d_0 = (D_0 - D_1) / r_0 ,   d_1 = (D_1 - D_2) / r_1 ,   c = (d_0 - d_1) / (r_0 + r_1) ,
    x_s = e^(-g) x + (1 - e^(-g)) D_0 + phi_2 (d_0 + r_0 c) - phi_3 c + s sqrt(1 - e^(-2 eta h)) z ,
    phi_2 = (e^(-g) - 1) / g + 1 ,   phi_3 = phi_2 / g - 1/2 .

The parabola through the three values is D_0 + (d_0 + r_0 c) tau + c tau^2, and the integral of its
tau^2 is -2 phi_3: the released rule takes half of it, so its order is 2. The whole of it, which is
of order 3, is exponential_adams.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.samplers.multistep import multistep


def dpmpp_3m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    *,
    eta: float = 0.0,
) -> Tensor:
    """Integrate from sigmas[0] to sigmas[-1] with one evaluation a step; order 2.

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
    """The weights of D_0, D_1 and D_2, as many as there are values."""
    whole = -math.expm1(-g)
    before = [math.log(sigma / sigma_next) / length for sigma_next, sigma in pairwise(levels)]
    if not before:
        return [whole]
    phi_2 = math.expm1(-g) / g + 1
    if len(before) == 1:
        return [whole + phi_2 / before[0], -phi_2 / before[0]]
    r_0, r_1 = before
    # What d_0 and d_1 count in the sum, with c put into it.
    curved = (phi_2 * r_0 - (phi_2 / g - 1 / 2)) / (r_0 + r_1)
    first, second = (phi_2 + curved) / r_0, -curved / r_1
    return [whole + first, second - first, -second]
