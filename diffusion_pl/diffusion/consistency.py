"""Consistency with a low-resolution image: functions that make denoised images agree with it.

The low-resolution y is the area mean A x of the image sought. A^+, repetition of pixels, is A's
pseudo-inverse, so of all images x with A x = y the nearest to D is

    D + A^+ (y - A D)

| where it stands | symbols |
|---|---|
| Wang 2023 (DDNM), arXiv:2212.00490, Eq. 13 | range-null space: A^+ y + (I - A^+ A) x_{0|t} |
| Choi 2021 (ILVR), arXiv:2108.02938 | on noisy states: x' + phi(y_t) - phi(x'_t), phi = A^+ A |
| Chung 2022 (CCDF), arXiv:2112.05146 | likewise: (I - P) x' + y_hat, P = A^+ A |

Here the image is sought within its range too, or what is clipped when it is saved would disagree.
The nearest image of both is D shifted by one number a block of pixels, then clipped: the conditions
of Karush, Kuhn and Tucker of the quadratic problem say so. The number is found by bisection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.errors import UserError

# Halves an interval of about 4 to 4e-12.
BISECTIONS = 40


def consistent(denoise: Denoise, small: Tensor, *, low: float = -1.0, high: float = 1.0) -> Denoise:
    """Replace the denoised image by the nearest one whose area mean is a low-resolution one.

    Args:
        denoise: D, of images a whole factor larger than `small`, any and several factors.
        small: y, (B, C, h, w) in [low, high].
        low: least value of an image.
        high: largest.

    Returns:
        A denoiser; what a network says of the variance passes through.
    """

    def agreeing(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        image, variance = denoise(x, sigma, **more).tensor_split([x.shape[1]], dim=1)
        return torch.cat([nearest(image, small, low=low, high=high), variance], dim=1)

    return agreeing


def nearest(image: Tensor, small: Tensor, *, low: float = -1.0, high: float = 1.0) -> Tensor:
    """The nearest image in [low, high] whose area mean is a low-resolution one.

    Args:
        image: (B, C, H, W).
        small: (B, C, h, w) in [low, high].
        low: least value of the result.
        high: its largest.

    Returns:
        Of the image's shape and dtype; its area mean is `small` to rounding.

    Raises:
        UserError: the image is no whole factor larger than `small`.
    """
    factor(small.shape[-2:], image.shape[-2:])
    height, width = small.shape[-2:]
    blocks = image.to(torch.float64).unflatten(3, (width, -1)).unflatten(2, (height, -1))
    wanted = small.to(torch.float64)[:, :, :, None, :, None]
    within = (3, 5)
    moved = blocks + wanted - blocks.mean(within, keepdim=True)
    if bool(((moved < low) | (moved > high)).any()):
        below = low - blocks.amax(within, keepdim=True)
        above = high - blocks.amin(within, keepdim=True)
        for _ in range(BISECTIONS):
            middle = (below + above) / 2
            short = (blocks + middle).clamp(low, high).mean(within, keepdim=True) < wanted
            below, above = torch.where(short, middle, below), torch.where(short, above, middle)
        moved = (blocks + (below + above) / 2).clamp(low, high)
    return moved.flatten(4, 5).flatten(2, 3).to(image.dtype)


def factor(small: tuple[int, ...], large: tuple[int, ...]) -> int:
    """How many times larger a size is, a whole number and both ways the same.

    Raises:
        UserError: it is not.
    """
    times, rest = divmod(large[0], small[0])
    if rest or times < 1 or large[1] != times * small[1]:
        raise UserError(
            f"{small[1]} x {small[0]} pixels are no whole part of {large[1]} x {large[0]}, so no "
            "mean of whole blocks; choose a multiple of the small image's size, or do without "
            "consistency"
        )
    return times
