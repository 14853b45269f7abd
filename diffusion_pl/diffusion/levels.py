"""Noise levels: every other coordinate of the field converted to sigma, in one place.

The state is x + sigma eps (Karras 2022, "variance exploding" form). A variance-preserving state
z = alpha x + sqrt(1 - alpha^2) eps is the same state scaled: z = c_in(sigma) (x + sigma eps).

| coordinate | of sigma |
|---|---|
| alpha_bar (Ho 2020, Eq. 4) | 1 / (1 + sigma^2) |
| logSNR (Kingma 2021) | -2 ln sigma |
"""

from __future__ import annotations

import torch
from torch import Tensor


def sigma_from_alpha_bar(alpha_bar: Tensor) -> Tensor:
    """Sigma of a variance-preserving level, sigma^2 = (1 - alpha_bar) / alpha_bar.

    Args:
        alpha_bar: the squared signal scale, in (0, 1], any shape.

    Returns:
        sigma >= 0 of the same shape and dtype.
    """
    return torch.sqrt((1 - alpha_bar) / alpha_bar)


def alpha_bar_from_sigma(sigma: Tensor) -> Tensor:
    """The squared signal scale of a level, 1 / (1 + sigma^2)."""
    return 1 / (1 + sigma.square())


def sigma_from_log_snr(log_snr: Tensor) -> Tensor:
    """Sigma of a logSNR, exp(-logSNR / 2)."""
    return torch.exp(-log_snr / 2)


def log_snr_from_sigma(sigma: Tensor) -> Tensor:
    """The log signal-to-noise ratio of a level, -2 ln sigma."""
    return -2 * torch.log(sigma)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Shape one value an image so that it broadcasts over the pixels.

    Args:
        values: (B,), or a scalar () that all images share.
        like: (B, C, H, W).

    Returns:
        (B, 1, 1, 1), or the scalar as it was.
    """
    return values.reshape(-1, *([1] * (like.ndim - 1))) if values.ndim else values
