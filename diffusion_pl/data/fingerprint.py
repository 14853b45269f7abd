"""The fingerprint of a set of images: equal content has an equal one, whatever files it lies in.

    sha256(header line, sha256(pixels of image i) for every i in order, labels)

An image's own digest needs no other image, so processes that each hold a part of a set take the
fingerprint of the whole together.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def image_digests(images: npt.NDArray[np.uint8]) -> bytes:
    """Digests of images, each by its own bytes alone.

    Args:
        images: uint8 (n, C, H, W).

    Returns:
        32 bytes an image, one after the other.
    """
    # Slices of one view cost less than an array an image.
    bytes_of = np.ascontiguousarray(images).reshape(-1).data
    length = images[0].size
    return b"".join(
        hashlib.sha256(bytes_of[first : first + length]).digest()
        for first in range(0, images.size, length)
    )


def fingerprint(
    digests: bytes, shape: Sequence[int], labels: npt.NDArray[np.integer] | None
) -> str:
    """The fingerprint of a set.

    Args:
        digests: of the images in order, 32 bytes each, one after the other.
        shape: (N, C, H, W).
        labels: (N,), or None when unlabelled.

    Returns:
        sha256, hex.
    """
    count, channels, height, width = shape
    assert len(digests) == 32 * count, (len(digests), count)
    whole = hashlib.sha256(f"uint8 {count} {channels} {height} {width}\n".encode())
    whole.update(digests)
    whole.update(b"unlabelled" if labels is None else labels.astype("<i8").data)
    return whole.hexdigest()
