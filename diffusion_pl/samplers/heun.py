"""Heun's method, deterministic and with churn (Karras 2022, Algorithms 1 and 2; sigma(t) = t)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise


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
) -> Tensor:
    """Integrate from sigmas[0] to sigmas[-1]; order 2.

    Each step first raises the noise to sigma_hat (churn), then averages the slopes at both ends.
    The step to sigma = 0 has no slope at its end and is Euler's.

    Args:
        denoise: D, called `denoise(x, sigma)`.
        x: the state at sigmas[0], float64 (B, C, H, W).
        sigmas: decreasing levels, float64 (N + 1,), all but the last > 0.
        randn_like: draws standard normal noise shaped as its argument; used only by churn.
        S_churn: overall amount of noise added, spread over the N steps; 0 is Algorithm 1.
        S_tmin: lowest level that is churned.
        S_tmax: highest level that is churned.
        S_noise: standard deviation of the added noise.

    Returns:
        The state at sigmas[-1], float64; 2 N evaluations, 2 N - 1 when the last level is 0.

    Raises:
        ValueError: S_churn or S_noise negative.
    """
    if S_churn < 0 or S_noise < 0:
        raise ValueError(f"S_churn and S_noise must not be negative (got {S_churn}, {S_noise})")
    gamma_max = min(S_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for sigma, following in pairwise(sigmas.tolist()):
        if gamma_max > 0 and S_tmin <= sigma <= S_tmax:
            raised = sigma * (1 + gamma_max)
            x = x + randn_like(x) * (S_noise * math.sqrt(raised**2 - sigma**2))
            sigma = raised
        denoised = denoise(x, x.new_tensor(sigma)).to(x.dtype)
        if following == 0:
            return denoised  # Euler's step to 0: D + (0 / sigma) (x - D)
        euler = torch.lerp(denoised, x, following / sigma)
        corrected = denoise(euler, x.new_tensor(following)).to(x.dtype)
        # x + h/2 (d + d'): h = following - sigma, d = (x - D) / sigma, d' = (x' - D') / following.
        half = (following - sigma) / 2
        slope = (x - denoised).div_(sigma).add_(euler.sub_(corrected), alpha=1 / following)
        x = x.add(slope, alpha=half)
    return x
