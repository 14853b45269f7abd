"""Euler's method on the probability-flow ODE, which is DDIM.

The ODE is dx/d sigma = (x - D(x; sigma)) / sigma (Karras 2022, Eq. 3). One step from sigma to s is

    x_s = x + (s - sigma) (x - D) / sigma = D + (s / sigma) (x - D) ,

and with D = x_0 and (x - D) / sigma = eps this is DDIM's step with eta = 0 (Song 2021, Eq. 12),
scaled to the state x + sigma eps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_pl.diffusion.guidance import Clip, clip_of
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.samplers.sampler import steps_along


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    *,
    clip_denoised: Clip = False,
) -> Tensor:
    """Integrate from sigmas[0] to sigmas[-1] with one evaluation a step; order 1, deterministic.

    Args:
        denoise, x, sigmas, randn_like: as for every `Integrator`.
        clip_denoised: what a step does to its image alone, while the noise stays as the network
            says (DDIM's released code, diffusers); a `Sampler`'s own changes both.
    """
    limit = clip_of(clip_denoised)
    x, wide = x.clone(), torch.empty_like(x)
    for sigma, sigma_next, level in steps_along(sigmas, x):
        denoised = denoise(x, level)
        x.lerp_(wide.copy_(denoised), 1 - sigma_next / sigma)
        if clip_denoised:
            x.add_(limit(denoised) - denoised)
    return x
