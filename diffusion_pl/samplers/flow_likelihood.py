"""The log likelihood of images by the probability-flow ODE.

Along dx/d sigma = f = (x - D) / sigma the density changes by the flow's divergence (Chen 2018,
arXiv:1806.07366; Song 2021, arXiv:2011.13456, App. D.2):

    ln p(x_0) = ln p(x_T) + integral of div f d sigma over [sigma_min, sigma_max]
              = ln p(x_T) + integral of (d - tr dD/dx) d ln sigma ,
    tr dD/dx = E v' (dD/dx) v ,   E v v' = 1  (Hutchinson)

| part | here |
|---|---|
| steps | Heun's method for the state, the trapezium rule in ln sigma for the integral: order 2 |
| probes v | +-1 or Gaussian, one for the whole way; none: the exact trace, d gradients a step |
| levels | even in ln sigma, of the network's whole range; doubled till nothing changes |
| prior p(x_T) | N(0, sigma_max^2), or the std given (sqrt(1 + sigma_max^2) for x_T ~ N(0, 1)) |
| bits/dim | -ln p / (d ln 2) + log2 127.5: 256 levels on [-1, 1] are bins of 1 / 127.5 |

The images are taken as samples of the level sigma_min. Uniform noise over their bins, which makes
the result a bound (Theis 2016, arXiv:1511.01844), is the caller's: `dequantised`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.schedules import LogUniform, levels

LEVELS_PER_UNIT = 127.5  # of 8-bit images in [-1, 1]


@dataclass(frozen=True, eq=False)
class Refined:
    """A number on a grid that is fine enough, or as fine as was asked for.

    Args:
        value: on the finer grid.
        steps: of that grid.
        change: of its mean from half as many steps; a rule of order 2 is off by a third of it.
    """

    value: Tensor
    steps: int
    change: float


def grid(sigma_range: tuple[float, float], steps: int) -> Tensor:
    """Levels even in ln sigma from the highest to the lowest, then 0: float64 (steps + 2,)."""
    return levels(LogUniform(*sigma_range), steps + 1)


def refined(
    measure: Callable[[int], Tensor],
    allowed: Callable[[Tensor], float],
    *,
    first: int = 64,
    most: int = 2048,
) -> Refined:
    """Double the steps until the mean changes by less than is allowed.

    Args:
        measure: the values on a grid of so many steps.
        allowed: the change that is small enough, for some values.
        first: steps of the coarsest grid.
        most: steps at which it ends anyhow.
    """
    coarse, steps = measure(first), 2 * first
    while True:
        value = measure(steps)
        change = float((value - coarse).mean().abs())
        if change < allowed(value) or 2 * steps > most:
            return Refined(value, steps, change)
        coarse, steps = value, 2 * steps


def log_likelihood(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    probe: Tensor | None,
    *,
    prior_std: float | None = None,
) -> Tensor:
    """ln p(x) of images, in nats.

    Args:
        denoise: D, differentiable in x.
        x: images, dequantised, (B, C, H, W).
        sigmas: decreasing to 0, float64 (N + 1,); visited from sigmas[-2] up.
        probe: v, shaped as x, with mean 0 and variance 1; None for the exact trace.
        prior_std: of the state at sigmas[0]; that level when not given.

    Returns:
        float64 (B,); 2 (N - 1) evaluations, each with its gradient.
    """
    state = x.to(torch.float64)
    gained = state.new_zeros(len(x))
    for sigma, sigma_next in pairwise(sigmas[:-1].flip(0).tolist()):
        step = sigma_next - sigma
        slope, trace = _flow(denoise, state, sigma, probe)
        ahead, trace_ahead = _flow(denoise, state + step * slope, sigma_next, probe)
        state = state + step / 2 * (slope + ahead)
        free = state[0].numel() - (trace + trace_ahead) / 2
        gained = gained + free * math.log(sigma_next / sigma)
    std = float(sigmas[0]) if prior_std is None else prior_std
    flat = state.flatten(1)
    normal = -flat.square().sum(1) / (2 * std**2) - flat.shape[1] / 2 * math.log(
        2 * math.pi * std**2
    )
    return normal + gained


def _flow(denoise: Denoise, x: Tensor, sigma: float, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    """The slope f and the trace of dD/dx at one level, (B, C, H, W) and (B,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        denoised = denoise(x, x.new_tensor(sigma)).to(x.dtype)
        trace = _trace(denoised, x, probe)
    return (x - denoised).detach() / sigma, trace


def _trace(denoised: Tensor, x: Tensor, probe: Tensor | None) -> Tensor:
    """The trace of dD/dx of each image, (B,): an estimate by a probe, or every diagonal element."""
    if probe is not None:
        probe = probe.to(x)
        (product,) = torch.autograd.grad(denoised, x, probe)
        return (product * probe).flatten(1).sum(1)
    flat = denoised.flatten(1)
    total = x.new_zeros(len(x))
    for pixel in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, pixel].sum(), x, retain_graph=True)
        total = total + row.flatten(1)[:, pixel]
    return total


def bits_per_dim(log_density: Tensor, dimensions: int) -> Tensor:
    """Nats of density of images in [-1, 1] to bits per dimension of their 256 levels."""
    return -log_density / (dimensions * math.log(2)) + math.log2(LEVELS_PER_UNIT)


def dequantised(image: Tensor, uniform: Tensor) -> Tensor:
    """Spread every pixel over its bin: x + (U - 1/2) / 127.5, U ~ U(0, 1) shaped as the image."""
    return image + (uniform - 0.5) / LEVELS_PER_UNIT


def rademacher(normal: Tensor) -> Tensor:
    """Probes of +-1 from normal ones: the least variance a probe of independent entries has."""
    return torch.where(normal >= 0, torch.ones_like(normal), -torch.ones_like(normal))
