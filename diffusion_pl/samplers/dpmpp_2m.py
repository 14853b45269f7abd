"""DPM-Solver++(2M), deterministic and stochastic: Lu et al. 2022, arXiv:2211.01095.

In lambda = -ln sigma and with h the step in lambda, the ODE (eta = 0) and the SDEs of the same
marginals are solved by

    x_s = e^(-g) x + integral over the step of e^(-(g - g')) D dg' + s sqrt(1 - e^(-2 eta h)) z ,
    g = (1 + eta) h ,

| part | formula |
|---|---|
| D in the step | D_i + h / (2 h_{i-1}) (D_i - D_{i-1}): extrapolated to the middle (Alg. 2) |
| eta | 0 is DPM-Solver++(2M), 1 SDE-DPM-Solver++(2M) |
| first step; step to 0 | D_i alone; D_i alone and no noise |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.errors import UserError


def dpmpp_2m(
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
        The state at sigmas[-1], float64; N evaluations.

    Raises:
        UserError: eta negative.
    """
    if eta < 0:
        raise UserError(f"eta must not be negative (got {eta})")
    x, on_device, length_before = x.clone(), sigmas.to(x), math.inf
    new, old = torch.empty_like(x), torch.zeros_like(x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        new.copy_(denoise(x, on_device[step]))
        if sigma_next == 0:
            return new
        length = math.log(sigma / sigma_next)
        kept = math.exp(-(1 + eta) * length)
        ahead = length / (2 * length_before)
        x.mul_(kept).add_(new, alpha=(1 - kept) * (1 + ahead)).add_(old, alpha=-(1 - kept) * ahead)
        if eta > 0:
            x.add_(randn_like(x), alpha=sigma_next * math.sqrt(-math.expm1(-2 * eta * length)))
        new, old, length_before = old, new, length
    return x
