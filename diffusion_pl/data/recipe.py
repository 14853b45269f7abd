"""How an original becomes the members of a shard: square crop, filter and encoding."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import PIL
from PIL import Image, features

from diffusion_pl.data.decode import (
    Fit,
    check_channels,
    fit_square,
    join_planes,
    planes,
    planes_of,
)
from diffusion_pl.data.depths import Depths
from diffusion_pl.data.member_images import raw_header
from diffusion_pl.data.reduce import FILTERS
from diffusion_pl.data.shard_format import ENDINGS, LARGEST_RESOLUTION
from diffusion_pl.data.sources.base import Original, Pixels
from diffusion_pl.errors import UserError

# Increased when the same settings give other pixels. 2: box-bicubic is that of ADM.
STEPS = "2"
CHANGED = frozenset({"box-bicubic"})  # filters that gave other pixels in version 1

FITS = ("crop", "pad", "exact")

# PNG: level 1 takes a third of the time of Pillow's 6 for photographs of the same size. WebP: 4 %
# smaller than PNG at twice the time. JPEG: as many colours as grey levels, 4:4:4.
_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {"compress_level": 1}),
    "webp": ("WEBP", {"lossless": True, "quality": 50, "method": 2, "exact": True}),
    "jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
}


@dataclass(frozen=True)
class Recipe:
    """How every original is prepared.

    Args:
        resolutions: sides in pixels; each is resized from the original itself.
        filter: a name of `reduce.FILTERS`.
        fit: crop to the central square, pad with white, or exact: squares of the largest side.
        encoding: png, webp, raw, or jpeg, the only lossy one.
        shard_images: originals a shard.
        channels: 3 for RGB, 1 for grey, 4 for RGB and a fourth, such as alpha.

    Raises:
        UserError: a name that is not known, or a number out of range.
    """

    resolutions: tuple[int, ...]
    filter: str = "lanczos"
    fit: str = "crop"
    encoding: str = "png"
    shard_images: int = 1000
    channels: int = 3

    def __post_init__(self) -> None:
        sides = self.resolutions
        if not sides or len(set(sides)) < len(sides):
            raise UserError(f"--resolutions: give each side once (got {list(sides)})")
        if not all(1 <= side <= LARGEST_RESOLUTION for side in sides):
            raise UserError(f"--resolutions: 1 to {LARGEST_RESOLUTION} pixels (got {list(sides)})")
        if self.shard_images < 1:
            raise UserError(f"--shard-images must be positive (got {self.shard_images})")
        for name, value, known in (
            ("filter", self.filter, FILTERS),
            ("fit", self.fit, FITS),
            ("encoding", self.encoding, ENDINGS),
        ):
            if value not in known:
                raise UserError(f"--{name} is {', '.join(known)} (got {value!r})")
        check_channels(self.channels, "--channels")
        if self.channels == 4 and self.encoding == "jpeg":
            raise UserError("--encoding: jpeg has no four channels; take png, webp or raw")

    @property
    def descending(self) -> list[int]:
        """The sides, largest first."""
        return sorted(self.resolutions, reverse=True)

    def side_of(self, size: Sequence[int]) -> int:
        """The side of an original [width, height] that becomes that of the square."""
        return max(size) if self.fit == "pad" else min(size)

    def squares(
        self, original: Original, *, where: str, depths: Depths | None = None
    ) -> tuple[dict[int, Pixels], list[int]]:
        """The image at each resolution.

        Args:
            original: of a source.
            where: names it in error messages.
            depths: counts 16-bit images.

        Returns:
            Pixels uint8 (channels, R, R) by R, descending, and [width, height] of the original.

        Raises:
            UserError: an image that is broken, refused or far too small.
        """
        if isinstance(original.image, Mapping):
            drawn = {side: self._of_pixels(original.image[side]) for side in self.descending}
            found = {side: join_planes(each, self.channels) for side, each in drawn.items()}
            return found, [self.descending[0]] * 2
        if isinstance(original.image, bytes):
            images = planes(original.image, self.channels, where=where, depths=depths)
        else:
            images = self._of_pixels(original.image)
        size = list(images[0].size)
        fit = cast(Fit, self.fit)
        if fit == "exact":
            images = [fit_square(each, self.descending[0], fit, where=where) for each in images]
            fit = "crop"  # of a square: the whole
        resize = FILTERS[self.filter]
        found = {}
        for side in self.descending:
            squares = [fit_square(each, side, fit, where=where, resize=resize) for each in images]
            found[side] = join_planes(squares, self.channels)
        return found, size

    def _of_pixels(self, pixels: Pixels) -> list[Image.Image]:
        """RGB pixels (3, H, W) as the RGB images of `planes`."""
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        return planes_of(image, self.channels)

    def encoded(self, pixels: Pixels) -> tuple[bytes, Pixels]:
        """Encode pixels uint8 (channels, R, R); also returns the pixels as they decode again."""
        if self.encoding == "raw":
            return raw_header(pixels.shape) + pixels.tobytes(), pixels
        name, options = _OPTIONS[self.encoding]
        buffer = io.BytesIO()
        grey = len(pixels) == 1
        image = Image.fromarray(
            pixels[0] if grey else np.ascontiguousarray(pixels.transpose(1, 2, 0))
        )
        image.save(buffer, name, **options)
        if self.encoding == "jpeg":
            with Image.open(buffer) as lossy:
                array = np.array(lossy)
                pixels = array[None] if grey else array.transpose(2, 0, 1)
        return buffer.getvalue(), pixels


def versions() -> dict[str, str]:
    """Versions of the libraries that decode, resize and encode; others may give other bytes."""
    libraries = {name: features.version(name) or "none" for name in ("jpg", "zlib", "webp")}
    numbers = {"pillow": PIL.__version__, "numpy": np.__version__, **libraries}
    return numbers | {"recipe": STEPS}
