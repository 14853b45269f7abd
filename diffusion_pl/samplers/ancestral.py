"""Ancestral sampling: DDPM's reverse chain and noisy DDIM (Ho 2020, Alg. 2; Song 2021, Eq. 12).

From level sigma to s < sigma the posterior q(x_s | x, x_0) of the state x_0 + s eps is Gaussian:

    mean      x_0 + (s / sigma)^2 (x - x_0)
    variance  s^2 (1 - (s / sigma)^2)              "small": beta_tilde_t / alpha_bar_{t-1}
              (sigma^2 - s^2) (1 + s^2) / (1 + sigma^2)  "large": beta_t / alpha_bar_{t-1}

Both variances are Ho's (section 3.2) divided by alpha_bar_{t-1}, which takes x_{t-1} to the state
x_0 + s eps; on a subset of the timesteps beta_t is the subset's, 1 - alpha_bar_t / alpha_bar_s.
Between the two a share f of the logarithm interpolates:

| variance | ln variance = f ln large + (1 - f) ln small | where |
|---|---|---|
| "small", "large" | f = 0, f = 1; large is also sigma-hat of Song 2021 | Ho 2020, 3.2 |
| a number | that f everywhere | Salimans & Ho 2022, released code |
| "learned" | f = (v + 1) / 2, v the network's last C channels | Nichol & Dhariwal 2021, Eq. 15 |

DDIM's eta scales the small variance and moves the mean so that the marginals stay:

    x_s = D + sqrt(s^2 - c^2) (x - D) / sigma + c z ,   c^2 = eta^2 s^2 (1 - (s / sigma)^2) .
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.posterior import SHARES, large_variance, small_variance
from diffusion_pl.errors import UserError
from diffusion_pl.samplers.sampler import steps_along


def ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor],
    *,
    variance: Literal["small", "large", "learned"] | float = "small",
    eta: float = 1.0,
) -> Tensor:
    """Walk the reverse chain with one evaluation a step; the step to 0 adds no noise.

    Args:
        denoise, x, sigmas, randn_like: as for every `Integrator`; for the learned variance D is
            called with `variance=True`.
        variance: "large" is Ho's beta_t ("fixedlarge", CIFAR-10), "small" beta_tilde_t (256 px), a
            number in [0, 1] in between, "learned" what the network says.
        eta: 0 is DDIM, 1 is DDPM; other values only with the small variance.

    Raises:
        UserError: eta or a numeric variance outside [0, 1], an unknown variance, or eta other
            than 1 with any but the small variance.
    """
    share: float | Tensor = _share(variance, eta)
    x, wide = x.clone(), torch.empty_like(x)
    for sigma, sigma_next, level in steps_along(sigmas, x):
        small = small_variance(sigma, sigma_next)
        remaining = math.sqrt(sigma_next**2 - eta**2 * small) / sigma
        if variance == "learned":
            denoised, said = denoise(x, level, variance=True).chunk(2, dim=1)
            share = (said + 1) / 2
        else:
            denoised = denoise(x, level)
        x.lerp_(wide.copy_(denoised), 1 - remaining)
        if sigma_next > 0 and eta > 0:
            ratio = large_variance(sigma, sigma_next) / small
            added = eta * math.sqrt(small) * ratio ** (share / 2)
            x.add_(randn_like(x) * added)
    return x


def _share(variance: str | float, eta: float) -> float:
    """The share of the large variance, where it is fixed; checks the settings."""
    if isinstance(variance, str) and variance not in (*SHARES, "learned"):
        raise UserError(
            f"variance must be small, large, learned or a number in [0, 1] (got {variance!r})"
        )
    share = SHARES.get(variance, 0.5) if isinstance(variance, str) else variance
    if not 0 <= share <= 1:
        raise UserError(f"variance must be in [0, 1] (got {variance})")
    if not 0 <= eta <= 1:
        raise UserError(f"eta must be in [0, 1] (got {eta})")
    if eta != 1 and share != 0:
        raise UserError(f"variance {variance!r} belongs to eta = 1 (got eta = {eta})")
    return share
