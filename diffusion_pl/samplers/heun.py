"""Second-order steps with churn: Heun's method (Karras 2022, Algorithms 1 and 2; sigma(t) = t).

A step of size h = s - sigma takes the slope d = (x - D) / sigma again at sigma + alpha h and joins
both as (1 - 1 / (2 alpha)) d + d' / (2 alpha) (App. D.2): alpha = 1 is Heun's method, 1/2 the
midpoint's. Written in D, which needs no slope in memory, that is

    x_s = D + (s / sigma) (x - D) + (sigma - s) / (2 alpha (sigma + alpha h)) (D' - D) .

Heun's method in the time t = s_n / (s_n + sigma) of flow matching, with noise of scale s_n, is the
same step with its last term times (s_n + s) / (s_n + sigma): the state is t x there, so a slope
counts by t. Near t = 0, where sigma is unbounded, only that one is of second order.

Here and beside, the state is updated in place and D copied into a buffer of its own: fresh tensors
of this size come from the system page by page and cost several times the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.errors import UserError


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    *,
    S_churn: float = 0.0,
    S_tmin: float = 0.0,
    S_tmax: float = math.inf,
    S_noise: float = 1.0,
    alpha: float = 1.0,
    nearest: Callable[[float], float] | None = None,
    noise_scale: float | None = None,
) -> Tensor:
    """Integrate from sigmas[0] to sigmas[-1]; order 2.

    Each step first raises the noise to sigma_hat (churn), then joins the slopes at two levels.
    A step whose second level would be 0 or below is Euler's: Heun's last one, to sigma = 0.

    Args:
        denoise, x, sigmas, randn_like: as for every `Integrator`.
        S_churn: overall amount of noise added over the N steps; 0 is Algorithm 1.
        S_tmin: lowest level that is churned.
        S_tmax: highest level that is churned.
        S_noise: standard deviation of the added noise.
        alpha: where in the step the second slope is taken, > 0; 1 is Heun, 1/2 the midpoint.
        nearest: the level nearest to a churned one that the network knows; None if it knows all.
        noise_scale: of the objective, to step in t of flow matching; None to step in sigma.

    Returns:
        As every `Integrator`; 2 N evaluations, 2 N - 1 when the last level is 0 and alpha >= 1.

    Raises:
        UserError: S_churn or S_noise negative, alpha or noise_scale not positive, or a step in t
            whose alpha is not 1.
    """
    if S_churn < 0 or S_noise < 0:
        raise UserError(f"S_churn and S_noise must not be negative (got {S_churn}, {S_noise})")
    if alpha <= 0:
        raise UserError(f"alpha must be positive (got {alpha})")
    if noise_scale is not None and (noise_scale <= 0 or alpha != 1):
        raise UserError(
            f"noise_scale must be positive, and alpha 1 beside it (got {noise_scale}, {alpha})"
        )
    x, wide, on_device = x.clone(), torch.empty_like(x), sigmas.to(x)
    gamma_max = min(S_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        level = on_device[step]
        if gamma_max > 0 and S_tmin <= sigma <= S_tmax:
            raised = sigma * (1 + gamma_max)
            raised = nearest(raised) if nearest else raised
            x.add_(randn_like(x), alpha=S_noise * math.sqrt(raised**2 - sigma**2))
            sigma, level = raised, x.new_tensor(raised)
        wide.copy_(denoise(x, level))
        between = sigma + alpha * (sigma_next - sigma)
        if between <= 0:
            x.lerp_(wide, 1 - sigma_next / sigma)
            continue
        probe = x if alpha == 1 else torch.lerp(wide, x, between / sigma)
        x.lerp_(wide, 1 - sigma_next / sigma)
        again = denoise(probe, on_device[step + 1] if alpha == 1 else x.new_tensor(between))
        weight = (sigma - sigma_next) / (2 * alpha * between)
        if noise_scale is not None:
            weight *= (noise_scale + sigma_next) / (noise_scale + sigma)
        x.add_(wide, alpha=-weight)
        x.add_(wide.copy_(again), alpha=weight)
    return x
