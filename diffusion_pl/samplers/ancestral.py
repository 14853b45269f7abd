"""Ancestral sampling: DDPM's reverse chain and noisy DDIM (Ho 2020, Alg. 2; Song 2021, Eq. 12).

From level sigma to s < sigma the posterior q(x_s | x, x_0) of the state x_0 + s eps is Gaussian:

    mean      x_0 + (s / sigma)^2 (x - x_0)
    variance  s^2 (1 - (s / sigma)^2)              "small": beta_tilde_t / alpha_bar_{t-1}
              (sigma^2 - s^2) (1 + s^2) / (1 + sigma^2)  "large": beta_t / alpha_bar_{t-1}

Both variances are Ho's (section 3.2) divided by alpha_bar_{t-1}, which takes x_{t-1} to the state
x_0 + s eps. DDIM's eta scales the small variance and moves the mean so that the marginals stay:

    x_s = D + sqrt(s^2 - c^2) (x - D) / sigma + c z ,   c^2 = eta^2 s^2 (1 - (s / sigma)^2) .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise


def ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    *,
    variance: Literal["small", "large"] = "small",
    eta: float = 1.0,
) -> Tensor:
    """Walk the reverse chain from sigmas[0] to sigmas[-1] with one evaluation a step.

    Args:
        denoise: D, called `denoise(x, sigma)`.
        x: the state at sigmas[0], float64 (B, C, H, W).
        sigmas: decreasing levels, float64 (N + 1,), all but the last > 0.
        randn_like: draws standard normal noise shaped as its argument.
        variance: "large" is Ho's beta_t ("fixedlarge", CIFAR-10), "small" beta_tilde_t (256 px).
        eta: 0 is DDIM, 1 is DDPM; other values only with the small variance.

    Returns:
        The state at sigmas[-1], float64; N evaluations. The step to sigma = 0 adds no noise.

    Raises:
        ValueError: eta outside [0, 1], or eta other than 1 with the large variance.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1] (got {eta})")
    if variance == "large" and eta != 1:
        raise ValueError(f"the large variance belongs to eta = 1 (got eta = {eta})")
    for sigma, following in pairwise(sigmas.tolist()):
        small = following**2 * (1 - (following / sigma) ** 2)
        remaining = math.sqrt(following**2 - eta**2 * small) / sigma
        denoised = denoise(x, x.new_tensor(sigma))
        x = torch.lerp(denoised.to(x.dtype), x, remaining)
        if following > 0 and eta > 0:
            large = (sigma**2 - following**2) * (1 + following**2) / (1 + sigma**2)
            added = math.sqrt(large) if variance == "large" else eta * math.sqrt(small)
            x.add_(randn_like(x), alpha=added)
    return x
