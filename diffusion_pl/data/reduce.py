"""Make images smaller by a named filter.

| name | what is done | used by |
|---|---|---|
| lanczos | windowed sinc of 3 lobes over the wider pixel, 8 bits | EDM, arXiv:2206.00364 |
| box-bicubic | halved while twice too large, bicubic, then cropped | ADM, arXiv:2105.05233 |
| area | the mean over the area that a new pixel covers, exact at any ratio | |

Lanczos is Pillow's own, so its pixels are those of EDM's tool; it is even on average, except that
its overshoot beside saturated colours is clipped. Box-bicubic is ADM's to the last bit, in 8 bits
as there: Pillow rounds up after each of its two passes, so noise becomes half a level brighter
whenever it is halved. The area is computed in integers and rounded once, ties to even.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

Resize = Callable[[Image.Image, tuple[int, int]], Image.Image]

# Rows that the exact mean treats at a time: 64 megapixels of int64 would be half a gigabyte.
_BAND = 256


def lanczos(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an RGB image to (width, height) by Lanczos with antialiasing."""
    return image.resize(size, Image.Resampling.LANCZOS)


def box_bicubic(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an RGB image to (width, height) by halving, then by an antialiased bicubic filter."""
    return _halve(image, size).resize(size, Image.Resampling.BICUBIC)


def _halve(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Halve an image while it is at least twice (width, height)."""
    width, height = image.size
    while width >= 2 * size[0] and height >= 2 * size[1]:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    return image


def _to_shorter_side(image: Image.Image, side: int) -> Image.Image:
    """ADM's steps: halve while the shorter side is twice too long, then bring it to `side`."""
    image = _halve(image, (side, side))
    shorter = min(image.size)
    # A quotient first, as there: its rounding decides where a length falls between two pixels.
    width, height = (round(length * (side / shorter)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def area(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an RGB image to (width, height) by exact means, in integers throughout."""
    width, height = size
    planes = []
    for plane in np.asarray(image).transpose(2, 0, 1):
        bands = [plane[first : first + _BAND] for first in range(0, len(plane), _BAND)]
        across = np.concatenate([_integrals(band.astype(np.int64), width) for band in bands])
        # In units of 1 / (width height) of a pixel, of which a new pixel covers W H.
        covered = _integrals(across.T, height).T
        planes.append(_divided(covered, image.size[0] * image.size[1]))
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


FILTERS: dict[str, Resize] = {"lanczos": lanczos, "box-bicubic": box_bicubic, "area": area}

# What brings the shorter side of a whole image to a length, by the filters whose users cut the
# central square out of the result; the others resize the square that was cut out of the image.
WHOLE_FIRST: dict[Resize, Callable[[Image.Image, int], Image.Image]] = {
    box_bicubic: _to_shorter_side
}


def _integrals(rows: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Integrals of each row over `count` equal intervals, times `count`.

    The running sum is linear between pixels, so between two of its values it is interpolated.

    Args:
        rows: (n, length).
        count: intervals.

    Returns:
        int64 (n, count).
    """
    length = rows.shape[1]
    running = np.zeros((len(rows), length + 1), dtype=np.int64)
    np.cumsum(rows, axis=1, out=running[:, 1:])
    whole, part = np.divmod(np.arange(count + 1) * length, count)
    after = np.minimum(whole + 1, length)
    edges: npt.NDArray[np.int64] = running[:, whole] * (count - part) + running[:, after] * part
    return np.diff(edges, axis=1)


def _divided(total: npt.NDArray[np.int64], by: int) -> npt.NDArray[np.int64]:
    """Quotients to the nearest integer, ties to the even one."""
    quotient, rest = np.divmod(total, by)
    odd = quotient % 2
    return quotient + (2 * rest + odd > by)
