"""The loop of the exponential multistep rules of three values; a rule is its weights.

In lambda = -ln sigma, with h the step and g = (1 + eta) h, all of them are

    x_s = e^(-g) x + sum_m w_m D_m + s sqrt(1 - e^(-2 eta h)) z .
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.errors import UserError

VALUES = 3  # that a rule weighs

# The weights of the values, the newest first, from: the levels that they are of, in the same order
# and at most three; h; and g.
Weights = Callable[[Sequence[float], float, float], list[float]]


def multistep(
    weights: Weights,
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    *,
    eta: float,
) -> Tensor:
    """Integrate from sigmas[0] to sigmas[-1] with one evaluation a step.

    Args:
        weights: of the last values of D.
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
    if eta < 0:
        raise UserError(f"eta must not be negative (got {eta})")
    x, on_device = x.clone(), sigmas.to(x)
    images = [torch.empty_like(x) for _ in range(VALUES)]  # D, the newest first
    levels: list[float] = []  # that they are of
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        images.insert(0, images.pop().copy_(denoise(x, on_device[step])))
        if sigma_next == 0:
            return images[0]
        length = math.log(sigma / sigma_next)
        levels = [sigma, *levels[: VALUES - 1]]
        x.mul_(math.exp(-(1 + eta) * length))
        for image, share in zip(images, weights(levels, length, (1 + eta) * length), strict=False):
            x.add_(image, alpha=share)
        if eta > 0:
            x.add_(randn_like(x), alpha=sigma_next * math.sqrt(-math.expm1(-2 * eta * length)))
    return x
