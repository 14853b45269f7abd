"""Euler's method on the probability-flow ODE, which is DDIM.

The ODE is dx/d sigma = (x - D(x; sigma)) / sigma (Karras 2022, Eq. 3). One step from sigma to s is

    x_s = x + (s - sigma) (x - D) / sigma = D + (s / sigma) (x - D) ,

and with D = x_0 and (x - D) / sigma = eps this is DDIM's step with eta = 0 (Song 2021, Eq. 12),
scaled to the state x + sigma eps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_pl.diffusion.guidance import Clip, clip_of
from diffusion_pl.diffusion.objective import Denoise


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    *,
    clip: Clip = False,
) -> Tensor:
    """Integrate from sigmas[0] to sigmas[-1] with one evaluation a step; order 1, deterministic.

    Args:
        denoise: D, called `denoise(x, sigma)`.
        x: the state at sigmas[0], float64 (B, C, H, W).
        sigmas: decreasing levels, float64 (N + 1,), all but the last > 0.
        randn_like: not used; every integrator takes it.
        clip: what a step does to its image alone, while the noise stays as the network says
            (DDIM's released code, diffusers); a sampler's own `clip` changes both.

    Returns:
        The state at sigmas[-1], float64; N evaluations.
    """
    limit = clip_of(clip)
    x, wide, on_device = x.clone(), torch.empty_like(x), sigmas.to(x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, on_device[step])
        x.lerp_(wide.copy_(denoised), 1 - sigma_next / sigma)
        if clip:
            x.add_(limit(denoised) - denoised)
    return x
