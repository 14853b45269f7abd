"""Pixel coordinates in the full frame, for pyramidal diffusion (Ryu & Ye 2022).

The coordinates k / (D - 1) of the full-resolution grid are resized with the image: a pixel has the
mean coordinate of the grid's pixels that it covers, so their spacing tells the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor


def coordinates(
    height: int,
    width: int,
    frame: int,
    device: torch.device | None = None,
    *,
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
) -> Tensor:
    """The coordinates of an image's pixels over the full frame.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        frame: D, side of the full-resolution grid, at least 2.
        window: the part of the frame that the image shows: top, left, height and width, in [0, 1].

    Returns:
        float32 (2, height, width): the row's coordinate, then the column's; within [0, 1].
    """
    top, left, tall, wide = window

    def axis(size: int, start: float, extent: float) -> Tensor:
        pixel = torch.arange(size, dtype=torch.float64, device=device)
        # The grid's k at the pixel's centre, which is the mean k over what it covers.
        k = (start + (pixel + 0.5) / size * extent) * frame - 0.5
        return (k / (frame - 1)).to(torch.float32)

    rows, columns = axis(height, top, tall), axis(width, left, wide)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
