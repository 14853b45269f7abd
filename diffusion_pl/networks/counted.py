"""Randomness that belongs to the images: image i's numbers come from (seed, i, layer) alone.

So they depend neither on how many images a device takes at once nor on how many devices there are,
nor on whether the network is compiled. A layer holds one long random row, made once from the seed;
an image's numbers are the window of it that begins at the image's own place. Finding the place is
the only thing counted an image, and a window is copied, not drawn.
"""

from __future__ import annotations

from torch import Tensor

from diffusion_pl.errors import UserError


def windows(row: Tensor, places: Tensor, width: int, images: int) -> Tensor:
    """The window of each image.

    Args:
        row: (2 n,), the second half as the first.
        places: where each image's window begins, int64 (B,), from 0 to n - 1.
        width: of a window, at most n.
        images: B, or a multiple of it: a batch that is seen several times over.

    Returns:
        (images, width).

    Raises:
        UserError: another number of images.
    """
    if images != len(places):  # a batch seen several times over, as guidance sees one
        if images % len(places):
            raise UserError(f"there are masks for {len(places)} images (got {images})")
        places = places.repeat(images // len(places))
    # Every window there is, without memory of its own.
    return row.as_strided((len(row) // 2, width), (1, 1)).index_select(0, places)
