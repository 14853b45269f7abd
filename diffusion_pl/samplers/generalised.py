"""The generalised sampler of EDM's ablation: any sigma(t) and s(t) (Karras 2022, Eq. 4, Alg. 1).

The state z = s (x + sigma eps) follows, primes being derivatives by t,

    dz/dt = (sigma' / sigma + s' / s) z - (sigma' s / sigma) D(z / s; sigma) .

| Table 1 | sigma(t) | s | first levels |
|---|---|---|---|
| VP | paths.VariancePreserving | 1 / sqrt(1 + sigma^2) | Along(path, epsilon_s) |
| VE | paths.VarianceExploding | 1 | LogUniform |
| iDDPM | paths.Linear | 1 | CosineBetas at spacings.IDDPMSteps |
| EDM | paths.Linear | 1 | Rho |

s' / s = -sigma sigma' / (1 + sigma^2) where s preserves the variance. The times are those of the
given levels, so that any discretisation goes with any path, as in the paper's ablation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.paths import Path


def generalised(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    *,
    path: Path,
    scaled: bool = False,
    order: Literal[1, 2] = 2,
) -> Tensor:
    """Integrate in the time of a path from sigmas[0] to sigmas[-1], deterministic.

    Args:
        denoise, x, sigmas, randn_like: as for every `Integrator`.
        path: sigma(t).
        scaled: integrate z with s = 1 / sqrt(1 + sigma^2) instead of s = 1.
        order: 1 is Euler's method, 2 Heun's, whose step to sigma = 0 is Euler's.

    Returns:
        As every `Integrator`; of order 2 twice as many evaluations, less one when the last level
        is 0.
    """
    times, on_device, levels = path.time(sigmas), sigmas.to(x), sigmas.tolist()
    rates = path.slope(times).tolist()  # infinite at sigma = 0, where none is needed
    scales = [1 / math.sqrt(1 + sigma**2) if scaled else 1.0 for sigma in levels]

    def derivative(state: Tensor, step: int) -> Tensor:
        sigma, rate, scale = levels[step], rates[step], scales[step]
        shrinking = sigma * rate / (1 + sigma**2) if scaled else 0.0
        denoised = denoise(state / scale, on_device[step]).to(state.dtype)
        return state * (rate / sigma - shrinking) - denoised * (rate * scale / sigma)

    state = x * scales[0]
    for step, (now, after) in enumerate(pairwise(times.tolist())):
        slope = derivative(state, step)
        ahead = state + (after - now) * slope
        if order == 2 and levels[step + 1] > 0:
            slope = (slope + derivative(ahead, step + 1)) / 2
            ahead = state + (after - now) * slope
        state = ahead
    return state / scales[-1]
