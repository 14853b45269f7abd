"""The two variances of a reverse step, which ancestral sampling and the likelihood share.

A share f of the logarithm interpolates, ln variance = f ln large + (1 - f) ln small; the fixed
choices of Ho 2020, section 3.2, are its ends.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Level = TypeVar("Level", float, Tensor)

SHARES = {"small": 0.0, "large": 1.0}


def small_variance(sigma: Level, sigma_next: Level) -> Level:
    """s^2 (1 - (s / sigma)^2), the variance of q(x_s | x, x_0) of the state x_0 + s eps.

    Ho 2020, Eq. 7: beta_tilde_t / alpha_bar_{t-1}.

    Args:
        sigma: the level that is left, > 0.
        sigma_next: s, the level that is reached, from 0 to sigma.
    """
    return sigma_next**2 * (1 - (sigma_next / sigma) ** 2)


def large_variance(sigma: Level, sigma_next: Level) -> Level:
    """(sigma^2 - s^2) (1 + s^2) / (1 + sigma^2): beta_t / alpha_bar_{t-1} (Ho 2020, section 3.2).

    What a reverse step would need had the images been unit noise; arguments as `small_variance`.
    """
    return (sigma**2 - sigma_next**2) * (1 + sigma_next**2) / (1 + sigma**2)
