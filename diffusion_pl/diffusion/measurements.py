"""Linear measurements y = A x of an image: a mask, a blur, down-sampling.

A measurement is anything with `forward`, x -> A x, and `adjoint`, y -> A^T y, which must be one
another's transposes: <A x, y> = <x, A^T y> for all x and y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_pl.errors import UserError


class Measurement(Protocol):
    """A linear map of images, the same for each image of a batch or one each."""

    def forward(self, image: Tensor) -> Tensor:
        """A x: (B, C, H, W) -> (B, C', H', W'), of its dtype."""

    def adjoint(self, measured: Tensor) -> Tensor:
        """A^T y: (B, C', H', W') -> (B, C, H, W), of its dtype."""


@dataclass(frozen=True, eq=False)
class Mask:
    """The known pixels; the others measure 0.

    Args:
        known: bool, broadcast to (B, C, H, W); True where the pixel is measured.
    """

    known: Tensor

    def forward(self, image: Tensor) -> Tensor:
        """The known pixels, and 0 elsewhere."""
        return torch.where(self.known, image, torch.zeros_like(image))

    def adjoint(self, measured: Tensor) -> Tensor:
        """The same map: it is a projection."""
        return self.forward(measured)


@dataclass(frozen=True)
class BlockMean:
    """Down-sampling by the mean of blocks of pixels, as `resizing.resized` does by "area".

    Args:
        times: side of a block in pixels, at least 1; it divides the sides of the image.
    """

    times: int

    def __post_init__(self) -> None:
        if self.times < 1:
            raise UserError(f"times must be at least 1 (got {self.times})")

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / times, W / times).

        Raises:
            UserError: the blocks do not divide the image.
        """
        height, width = image.shape[-2:]
        if height % self.times or width % self.times:
            raise UserError(
                f"blocks of {self.times} x {self.times} pixels do not divide an image of "
                f"{width} x {height}"
            )
        return functional.avg_pool2d(image, self.times)

    def adjoint(self, measured: Tensor) -> Tensor:
        """Every pixel repeated, divided by the pixels of a block."""
        wide = measured.repeat_interleave(self.times, -2).repeat_interleave(self.times, -1)
        return wide / self.times**2


@dataclass(frozen=True)
class GaussianBlur:
    """Convolution with a Gaussian, the image mirrored at its edges.

    Mirrored about the edge, not about the last pixel, an even kernel gives a symmetric matrix, so
    the map is its own adjoint.

    Args:
        std: of the Gaussian in pixels, > 0; it is cut at 4 std.
    """

    std: float

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise UserError(f"std of a blur must be positive (got {self.std})")

    def forward(self, image: Tensor) -> Tensor:
        """The blurred image, of the same size."""
        rows, columns = (self._matrix(side).to(image) for side in image.shape[-2:])
        return rows @ image @ columns.T

    def adjoint(self, measured: Tensor) -> Tensor:
        """The same map."""
        return self.forward(measured)

    def _matrix(self, side: int) -> Tensor:
        """What each pixel of the result takes of each pixel along an axis, (side, side)."""
        reach = math.ceil(4 * self.std)
        offset = torch.arange(-reach, reach + 1)
        weight = torch.softmax(-offset.to(torch.float64).square() / (2 * self.std**2), 0)
        place = (torch.arange(side)[:, None] + offset) % (2 * side)
        place = torch.where(place < side, place, 2 * side - 1 - place)
        taken = torch.zeros(side, side, dtype=torch.float64)
        return taken.scatter_add_(1, place, weight.expand_as(place))
