"""From an image to noise along the probability-flow ODE, and what is found between two images.

The ODE dx/d sigma = (x - D) / sigma (Karras 2022, Eq. 3) runs either way, so an image has one
latent for a model, and the sampler brings it back (Song 2021, arXiv:2010.02502; with Euler's method
that is DDIM inversion). Interpolation mixes two images at one level: noised independently and mixed
linearly (Ho 2020, section 4.4), or inverted and mixed along the great circle.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_pl.diffusion.levels import per_image
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.errors import UserError
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Integrator


def below(sigmas: Tensor, level: float) -> Tensor:
    """The levels of a sampler that begins at a level of its own: that one, then all lower ones.

    A level less than 1e-4 of itself below is left out: from so short a step multistep rules would
    extrapolate over the next one.

    Args:
        sigmas: decreasing to 0, float64 (N + 1,).
        level: in (0, the highest].

    Raises:
        UserError: a level above the highest or below the lowest.
    """
    if not float(sigmas[-2]) < level <= float(sigmas[0]) * (1 + 1e-9):
        raise UserError(
            f"the level must lie within the sampler's, {float(sigmas[-2]):g} to "
            f"{float(sigmas[0]):g} (got {level:g})"
        )
    return torch.cat([sigmas.new_tensor([level]), sigmas[sigmas < level * (1 - 1e-4)]])


def invert(denoise: Denoise, image: Tensor, sigmas: Tensor, integrate: Integrator = heun) -> Tensor:
    """The state at sigmas[0] from which the flow ends in an image.

    Args:
        denoise: D, called `denoise(x, sigma)`.
        image: clean images (B, C, H, W).
        sigmas: decreasing to 0, float64 (N + 1,), as the way back will visit them.
        integrate: a deterministic one-step method, heun or euler; its errors of the way up and
            down cancel the better, the more steps there are.

    Returns:
        float64 (B, C, H, W); `integrate(denoise, state, sigmas, ...)` is the image again.
    """
    image = image.to(torch.float64)
    lowest = sigmas[-2]
    # At sigma = 0 the slope is 0 / 0; the first step takes the slope at its end, (x - D) / sigma.
    state = 2 * image - denoise(image, lowest.to(image)).to(torch.float64)
    upwards = sigmas[:-1].flip(0)
    return integrate(denoise, state, upwards, torch.zeros_like) if len(upwards) > 1 else state


def spherical(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Mix along the great circle: sin((1 - w) a) / sin(a) first + sin(w a) / sin(a) second.

    A mix of two Gaussian latents so keeps their length; linearly it would be too short. Shoemake
    1985, with a the angle between the two.

    Args:
        first: where weight = 0, (B, C, H, W).
        second: where weight = 1.
        weight: (B,), in [0, 1].
    """
    one, other = first.flatten(1), second.flatten(1)
    cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos()
    # Through parallel latents goes no great circle, or every one: the line, then.
    parallel = angle.sin() < 1e-3
    safe = torch.where(parallel, torch.ones_like(angle), angle)
    ends = torch.stack([((1 - weight) * safe).sin(), (weight * safe).sin()]) / safe.sin()
    line = torch.stack([1 - weight, weight])
    of_first, of_second = torch.where(parallel, line, ends)
    return per_image(of_first, first) * first + per_image(of_second, second) * second


def linear(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Mix on the line, (1 - w) first + w second (Ho 2020, section 4.4); as `spherical`."""
    share = per_image(weight, first)
    return (1 - share) * first + share * second


Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def interpolate(
    denoise: Denoise,
    ends: tuple[Tensor, Tensor],
    weights: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    *,
    integrate: Integrator = heun,
    mix: Mix = linear,
) -> Tensor:
    """Mix two states of one level and take the mixtures down to images.

    Args:
        denoise: D, called `denoise(x, sigma)`.
        ends: the states at sigmas[0], (C, H, W) each: an image and noise of that level, or its
            inversion. They stay as they are while the weight varies.
        weights: (n,), 0 for the first, 1 for the second.
        sigmas: decreasing to 0.
        randn_like: the noise of stochastic integrators.
        integrate: the algorithm.
        mix: `linear` or `spherical`.

    Returns:
        float32 (n, C, H, W).
    """
    weights = weights.to(ends[0].device, torch.float64)
    first, second = (end.to(torch.float64).expand(len(weights), -1, -1, -1) for end in ends)
    state = mix(first, second, weights)
    return integrate(denoise, state, sigmas, randn_like).to(torch.float32)


def branch(
    denoise: Denoise,
    noise: Tensor,
    sigmas: Tensor,
    level: float,
    shared: Callable[[Tensor], Tensor],
    own: Callable[[Tensor], Tensor],
    *,
    count: int,
    integrate: Integrator,
) -> Tensor:
    """Sample one image down to a level, then several continuations of it (Ho 2020, App. D, Fig. 7).

    Args:
        denoise: D, called `denoise(x, sigma)`, of any number of images.
        noise: the state at sigmas[0], (1, C, H, W).
        sigmas: decreasing to 0.
        level: where the continuations part; they share all above it.
        shared: the noise above the level, of one image.
        own: the noise below it, of `count` images.
        count: continuations.
        integrate: a stochastic algorithm; a deterministic one gives `count` equal images.

    Returns:
        float32 (count, C, H, W).
    """
    after = below(sigmas, level)
    before = torch.cat([sigmas[sigmas > level], after[:1]])
    state = noise.to(torch.float64)
    if len(before) > 1:
        state = integrate(denoise, state, before, shared)
    parted = state.expand(count, -1, -1, -1).contiguous()
    return integrate(denoise, parted, after, own).to(torch.float32)
