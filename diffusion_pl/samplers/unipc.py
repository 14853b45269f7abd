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
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.samplers.quadrature import Rule, exponential_weights, gauss_legendre

Value = tuple[float, Tensor]  # ln sigma, D


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    *,
    order: int = 2,
) -> Tensor:
    """Integrate from sigmas[0] to sigmas[-1] with one evaluation a step; deterministic.

    Args:
        denoise: D, called `denoise(x, sigma)`.
        x: the state at sigmas[0], float64 (B, C, H, W).
        sigmas: decreasing levels, float64 (N + 1,), all but the last > 0.
        randn_like: not used; every integrator takes it.
        order: p of UniPC-p, the values that predict, at least 1; the order is p + 1 once the first
            steps, which have fewer, no longer count.

    Returns:
        The state at sigmas[-1], float64; N evaluations. The step to sigma = 0 takes D alone.

    Raises:
        ValueError: order below 1.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1 (got {order})")
    rule, on_device, before = gauss_legendre(), sigmas.to(x), x
    past: list[Value] = []  # the newest first
    for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        value = math.log(sigma), denoise(x, on_device[step])
        if following == 0:
            return value[1].to(x.dtype)
        if past:
            x = _step(before, [*past, value], value[0], rule)
        before, past = x, [value, *past[: order - 1]]
        x = _step(before, past, math.log(following), rule)
    return x


def _step(x: Tensor, values: Sequence[Value], end: float, rule: Rule) -> Tensor:
    """From the level of the first value to ln sigma = end."""
    start, denoised = values[0]
    length = start - end
    nodes = [(start - level) / length for level, _ in values]
    if len(values) == 2:
        shares = [math.nan, -math.expm1(-length) / (2 * nodes[1])]
    else:
        shares = exponential_weights(nodes, length, rule)
    x = torch.lerp(denoised.to(x.dtype), x, math.exp(-length))
    for (_, other), share in zip(values[1:], shares[1:], strict=True):
        x.add_(other - denoised, alpha=share)
    return x
