"""The range of values that 16-bit images use: 12 bits of a scanner in 16 become almost black."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

LARGEST = 65_535


@dataclass
class Depths:
    """The range of the 16-bit images seen so far; may be updated from several threads.

    Args:
        images: how many.
        low: smallest value, 0 to 65,535.
        high: largest value.
    """

    images: int = 0
    low: int = LARGEST
    high: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def __getstate__(self) -> dict[str, int]:
        return {"images": self.images, "low": self.low, "high": self.high}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def note(self, image: Image.Image, data: bytes) -> None:
        """Count an image, as Pillow has decoded it, if `data`, its file, has 16 bits a value."""
        if image.mode.startswith("I;16"):
            values = np.asarray(image)
            self.add(Depths(1, int(values.min()), int(values.max())))
        elif data[12:16] == b"IHDR" and data[24] == 16:
            # Of 16-bit colour Pillow keeps the high bytes.
            values = np.atleast_3d(np.asarray(image))
            colours = values[:, :, : len(image.getbands()) - (image.mode[-1] == "A")]
            low, high = int(colours.min()), int(colours.max())
            self.add(Depths(1, low << 8, (high << 8) + 255))

    def add(self, other: Depths) -> None:
        """Merge another range into this one."""
        with self._lock:
            self.images += other.images
            self.low = min(self.low, other.low)
            self.high = max(self.high, other.high)

    def line(self) -> str | None:
        """A warning where no more than half of the range is used; None otherwise."""
        if not self.images or self.high - self.low > LARGEST // 2:
            return None
        return (
            f"{self.images:,} images of 16 bits hold values from {self.low:,} to {self.high:,} of "
            f"0 to {LARGEST:,} and become levels {round(self.low / 257)} to "
            f"{round(self.high / 257)} of 255; stretch them to the whole range first unless that "
            f"is meant"
        )
