"""UniPC: Zhao et al., A Unified Predictor-Corrector Framework, 2023, arXiv:2302.04867.

Predicting D, in lambda = -ln sigma, with h the step, tau the share of it and k values D_m known,
the newest D_0 at tau = 0:

    x_s = e^(-h) x + (1 - e^(-h)) D_0 + sum_m w_m (D_m - D_0)

| part | formula |
|---|---|
| predictor, UniP-k | the k values D_m; gives the state at which D(s) is evaluated |
| corrector, UniC-k | the same step once more with D(s), at tau = 1, as a further value |
| w_m of a single D_m beside D_0 | B(h) / (2 tau_m), with B(h) = 1 - e^(-h), the paper's B_2 |
| w_m of several | polynomial through all values, integrated exactly: B(h) cancels |

D is evaluated once a step, at the predicted state: the corrector is free. UniP-2 is
DPM-Solver++(2M); the corrector raises the order by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.errors import UserError
from diffusion_pl.samplers.quadrature import exponential_weights
from diffusion_pl.samplers.sampler import steps_along


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    *,
    order: int = 2,
) -> Tensor:
    """Integrate from sigmas[0] to sigmas[-1] with one evaluation a step; deterministic.

    The step to sigma = 0 takes D alone.

    Args:
        denoise, x, sigmas, randn_like: as for every `Integrator`.
        order: p of UniPC-p, the values that predict, at least 1; the order is p + 1 once the first
            steps, which have fewer, no longer count.

    Raises:
        UserError: order below 1.
    """
    if order < 1:
        raise UserError(f"order must be at least 1 (got {order})")
    state, x = x.clone(), x.clone()  # corrected, predicted
    images = [torch.empty_like(x) for _ in range(order + 1)]  # D, the newest first
    levels: list[float] = []
    for sigma, sigma_next, level in steps_along(sigmas, x):
        images.insert(0, images.pop().copy_(denoise(x, level)))
        if sigma_next == 0:
            return images[0]
        if levels:
            known = [*images[1 : len(levels) + 1], images[0]]
            _move(state, known, [*levels, math.log(sigma)], math.log(sigma))
        levels = [math.log(sigma), *levels[: order - 1]]
        _move(x.copy_(state), images, levels, math.log(sigma_next))
    return x


def _move(x: Tensor, images: Sequence[Tensor], levels: Sequence[float], end: float) -> None:
    """Take x in place from ln sigma = levels[0] to the end with the images known at the levels."""
    length = levels[0] - end
    nodes = [(levels[0] - level) / length for level in levels]
    if len(nodes) == 2:
        beside = -math.expm1(-length) / (2 * nodes[1])
        shares = [-math.expm1(-length) - beside, beside]
    else:
        shares = exponential_weights(nodes, length)
    x.mul_(math.exp(-length))
    for image, share in zip(images, shares, strict=False):
        x.add_(image, alpha=share)
