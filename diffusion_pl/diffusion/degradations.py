"""What a network that takes images is given of the clean one: less of it.

| degradation | given | source |
|---|---|---|
| Downsampled | the mean of every block of pixels, repeated over the block | SR3, arXiv:2104.07636 |
| Boxes | the image but for a random box | Palette, arXiv:2111.05826 |
| Grey | its luma, in every channel | Palette |
| Blurred | the image after a Gaussian blur | |

What is given is rounded to 8 bits, as a file of it would be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusion_pl.diffusion.measurements import BlockMean, GaussianBlur
from diffusion_pl.errors import UserError

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


@dataclass(frozen=True)
class Downsampled:
    """A low-resolution image at the size of the full one, for super-resolution.

    Args:
        times: side of a block in pixels, at least 2; it divides the sides of the image.
    """

    draws: ClassVar[int] = 0
    times: int

    def __post_init__(self) -> None:
        if self.times < 2:
            raise UserError(f"times must be at least 2 (got {self.times})")

    def __call__(self, image: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Every block's mean in all of its pixels."""
        means = _rounded(BlockMean(self.times).forward(image))
        return repeated(means, self.times), _everywhere(image)


@dataclass(frozen=True)
class Blurred:
    """A blurred image, for deblurring.

    Args:
        std: of the Gaussian in pixels, > 0.
    """

    draws: ClassVar[int] = 0
    times: ClassVar[int] = 1
    std: float

    def __post_init__(self) -> None:
        GaussianBlur(self.std)

    def __call__(self, image: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The image after the blur."""
        return _rounded(GaussianBlur(self.std).forward(image)), _everywhere(image)


@dataclass(frozen=True)
class Grey:
    """A grey image, for colourisation."""

    draws: ClassVar[int] = 0
    times: ClassVar[int] = 1

    def __call__(self, image: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The luma of red, green and blue in all three."""
        if image.shape[1] != 3:
            raise UserError(f"grey images are made of 3 channels (got {image.shape[1]})")
        luma = sum(weight * image[:, at : at + 1] for at, weight in enumerate(LUMA))
        assert isinstance(luma, Tensor)
        return _rounded(luma).expand_as(image).contiguous(), _everywhere(image)


@dataclass(frozen=True)
class Boxes:
    """An image without a random box, for inpainting.

    The sides of the box are drawn uniformly and on their own, its place uniformly within the image.

    Args:
        least: smallest side as a share of the image's.
        most: largest side.
    """

    draws: ClassVar[int] = 4
    times: ClassVar[int] = 1
    least: float = 0.25
    most: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most <= 1:
            raise UserError(
                f"sides of boxes must rise within (0, 1] (got {self.least} and {self.most})"
            )

    def __call__(self, image: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The image, unknown within the box."""
        draws = draws.to(image.device)
        rows = self._span(image.shape[2], draws[:, 0], draws[:, 1])
        columns = self._span(image.shape[3], draws[:, 2], draws[:, 3])
        known = ~(rows[:, None, :, None] & columns[:, None, None, :])
        return torch.where(known, image, 0), known

    def _span(self, size: int, share: Tensor, place: Tensor) -> Tensor:
        """Which of the pixels along an axis lie in the box, bool (B, size)."""
        low, high = (max(1, round(size * each)) for each in (self.least, self.most))
        side = low + (share * (high - low + 1)).long()
        first = (place * (size - side + 1)).long()
        at = torch.arange(size, device=share.device)
        return (at >= first[:, None]) & (at < (first + side)[:, None])


def repeated(image: Tensor, times: int) -> Tensor:
    """Every pixel `times` x `times` times, (B, C, H, W) -> (B, C, times H, times W)."""
    return image.repeat_interleave(times, -2).repeat_interleave(times, -1)


def _rounded(image: Tensor) -> Tensor:
    """The nearest of the 256 levels that 8 bits have in [-1, 1]."""
    return ((image + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def _everywhere(image: Tensor) -> Tensor:
    """A mask that knows all pixels."""
    return torch.ones_like(image[:, :1], dtype=torch.bool)
