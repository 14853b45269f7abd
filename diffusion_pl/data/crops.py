"""Random crops of images with their coordinates in the full frame, for patch-wise training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_pl.data.draws import uniforms
from diffusion_pl.errors import UserError
from diffusion_pl.positions import coordinates


@dataclass(frozen=True)
class Crop:
    """A random square window of every image, anywhere in it with equal probability.

    Args:
        size: side of the result in pixels. Images no larger stay whole.
        scale: smallest and largest side of the window as a share of the image's, drawn uniformly,
            the window then resized to `size` (bilinear, antialiased); None: `size` pixels as they
            are.
        return_position: whether the network is given where the window lies, as the condition
            `position`.

    Raises:
        UserError: a size or a scale out of range.
    """

    size: int
    scale: tuple[float, float] | None = None
    return_position: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"crop.size must be at least 1 pixel (got {self.size})")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"crop.scale must rise within (0, 1] (got {list(self.scale)})")

    def __call__(
        self, image: Tensor, positions: Tensor, *, seed: int, frame: int
    ) -> tuple[Tensor, Tensor]:
        """Cut the windows.

        Args:
            image: uint8 (B, C, R, R), R > `size`.
            positions: int64 (B,), of the images in the run; with `seed` they choose the windows.
            seed: of the run.
            frame: D, side of the full-resolution grid.

        Returns:
            image: uint8 (B, C, size, size).
            position: float32 (B, 2, size, size), coordinates over the full frame.
        """
        whole = image.shape[3]
        sides = self._sides(whole, positions, seed)
        tops, lefts = (
            # A window of side s has whole - s + 1 places.
            (uniforms(seed, f"crop {axis}", positions) * (whole - sides + 1)).long().tolist()
            for axis in ("row", "column")
        )
        pieces, places = [], []
        for pixels, top, left, side in zip(image, tops, lefts, sides.tolist(), strict=True):
            pieces.append(self._resized(pixels[:, top : top + side, left : left + side]))
            window = (top / whole, left / whole, side / whole, side / whole)
            places.append(coordinates(self.size, self.size, frame, window=window))
        return torch.stack(pieces), torch.stack(places)

    def _sides(self, whole: int, positions: Tensor, seed: int) -> Tensor:
        if self.scale is None:
            return torch.full_like(positions, self.size)
        low, high = (round(share * whole) for share in self.scale)
        sides = low + uniforms(seed, "crop side", positions) * (high - low + 1)
        return sides.long().clamp(min=1)

    def _resized(self, window: Tensor) -> Tensor:
        if window.shape[-1] == self.size:
            return window
        resized = functional.interpolate(
            window[None].float(), (self.size, self.size), mode="bilinear", antialias=True
        )
        return resized[0].round_().clamp_(0, 255).to(torch.uint8)
