"""DPM-Solver++(2M) and (3M), deterministic and stochastic: Lu et al. 2022, arXiv:2211.01095.

In lambda = -ln sigma, with h the step, the ODE (eta = 0) and the SDEs of the same marginals are
solved by

    x_s = e^(-g) x + integral over the step of e^(-(g - g')) D dg' + s sqrt(1 - e^(-2 eta h)) z ,
    g = (1 + eta) h .

A rule replaces the integral by sum_m w_m D_m over the last values of D, the newest D_0. With r_0
and r_1 the lengths of the step before and of the one before that in units of h,

| rule | sum_m w_m D_m | where |
|---|---|---|
| 2M | (1 - e^(-g)) (D_0 + (D_0 - D_1) / (2 r_0)): extrapolated to the middle | Alg. 2 |
| 3M | (1 - e^(-g)) D_0 + phi_2 (d_0 + r_0 c) - phi_3 c | released code |

    d_0 = (D_0 - D_1) / r_0 ,   d_1 = (D_1 - D_2) / r_1 ,   c = (d_0 - d_1) / (r_0 + r_1) ,
    phi_2 = (e^(-g) - 1) / g + 1 ,   phi_3 = phi_2 / g - 1/2 .

The parabola through the three values is D_0 + (d_0 + r_0 c) tau + c tau^2, and the integral of its
tau^2 is -2 phi_3: the released 3M takes half of it, so its order is 2. The whole of it, which is
of order 3, is exponential_adams.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.errors import UserError
from diffusion_pl.samplers.sampler import steps_along

# The weights of the values, the newest first, from: the levels that they are of, in the same order;
# h; and g. In the first steps there are fewer values.
Weights = Callable[[Sequence[float], float, float], list[float]]


def multistep(
    weights: Weights,
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    *,
    values: int = 3,
    eta: float,
) -> Tensor:
    """The loop of the exponential multistep rules: one evaluation a step.

    The step to sigma = 0 takes D alone and adds no noise.

    Args:
        weights: of the last values of D.
        denoise, x, sigmas, randn_like: as for every `Integrator`.
        values: the most that the rule weighs.
        eta: how much noise is renewed: 0 is the ODE, 1 the reverse SDE.

    Raises:
        UserError: eta negative.
    """
    if eta < 0:
        raise UserError(f"eta must not be negative (got {eta})")
    x = x.clone()
    images = [torch.empty_like(x) for _ in range(values)]  # D, the newest first
    levels: list[float] = []  # that they are of
    for sigma, sigma_next, level in steps_along(sigmas, x):
        images.insert(0, images.pop().copy_(denoise(x, level)))
        if sigma_next == 0:
            return images[0]
        length = math.log(sigma / sigma_next)
        levels = [sigma, *levels[: values - 1]]
        x.mul_(math.exp(-(1 + eta) * length))
        for image, share in zip(images, weights(levels, length, (1 + eta) * length), strict=False):
            x.add_(image, alpha=share)
        if eta > 0:
            x.add_(randn_like(x), alpha=sigma_next * math.sqrt(-math.expm1(-2 * eta * length)))
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    *,
    eta: float = 0.0,
) -> Tensor:
    """DPM-Solver++(2M); order 2. Arguments as for `multistep`."""
    return multistep(_weights_2m, denoise, x, sigmas, randn_like, values=2, eta=eta)


def dpmpp_3m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    *,
    eta: float = 0.0,
) -> Tensor:
    """DPM-Solver++(3M) as it was released; order 2. Arguments as for `multistep`."""
    return multistep(_weights_3m, denoise, x, sigmas, randn_like, eta=eta)


def _weights_2m(levels: Sequence[float], length: float, g: float) -> list[float]:
    whole = 1 - math.exp(-g)
    if len(levels) == 1:
        return [whole]
    ahead = length / (2 * math.log(levels[1] / levels[0]))
    return [whole * (1 + ahead), -whole * ahead]


def _weights_3m(levels: Sequence[float], length: float, g: float) -> list[float]:
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
