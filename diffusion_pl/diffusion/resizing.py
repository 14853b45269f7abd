"""Images at another size: area means, bilinear and bicubic, at any factor and in float64.

Area means take white noise of variance 1 to white noise of variance 1 / factor^2, so at half the
size an image of level sigma looks like one of level sigma / 2 (Hoogeboom 2023, Eq. 4).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_pl.errors import UserError

Kernel = Literal["area", "bilinear", "bicubic"]
KERNELS: tuple[Kernel, ...] = ("area", "bilinear", "bicubic")


def resized(image: Tensor, size: tuple[int, int], kernel: Kernel = "area") -> Tensor:
    """An image at another size, larger or smaller, antialiased where it becomes smaller.

    Args:
        image: (B, C, H, W).
        size: height and width of the result in pixels.
        kernel: "area" gives every pixel the mean of what it covers, so a whole factor repeats or
            averages pixels; "bilinear" and "bicubic" are smooth and do not keep that mean.

    Returns:
        Of the image's dtype, (B, C, *size).

    Raises:
        UserError: an unknown kernel.
    """
    if kernel not in KERNELS:
        raise UserError(f"there is no kernel {kernel!r}; there are {', '.join(KERNELS)}")
    # float64 is what autocast leaves alone: a product of matrices would be one of bfloat16.
    wide = image.to(torch.float64)
    if kernel == "area":
        rows, columns = (
            coverage(source, target).to(image.device)
            for source, target in zip(image.shape[-2:], size, strict=True)
        )
        return (rows @ wide @ columns.T).to(image.dtype)
    return functional.interpolate(wide, size, mode=kernel, antialias=True).to(image.dtype)


def coverage(source: int, target: int) -> Tensor:
    """What share of each target pixel every source pixel makes up, along one axis.

    Args:
        source: pixels of the image.
        target: pixels of the result; more or fewer.

    Returns:
        float64 (target, source), rows that add up to 1.
    """
    # In units of 1 / (source target) of the axis, where all edges are whole numbers.
    starts, lefts = torch.arange(target)[:, None] * source, torch.arange(source) * target
    overlap = torch.minimum(starts + source, lefts + target) - torch.maximum(starts, lefts)
    return overlap.clamp(min=0).to(torch.float64) / source
