"""The fingerprint of a set is what its docstring says, and sees every bit."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from diffusion_pl.data.dataset import load
from diffusion_pl.data.fingerprint import fingerprint, image_digests


def _set() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (5, 3, 4, 4), dtype=np.uint8), np.array([0, 1, 2, 1, 0])


def test_it_is_the_digest_of_the_images_digests():
    """The formula once more; a change of it would part all sets from their references."""
    pixels, labels = _set()
    digests = b"".join(hashlib.sha256(image.tobytes()).digest() for image in pixels)
    head = b"uint8 5 3 4 4\n" + digests
    labelled = hashlib.sha256(head + labels.astype("<i8").tobytes()).hexdigest()
    bare = hashlib.sha256(head + b"unlabelled").hexdigest()
    assert image_digests(pixels) == digests
    for numbers in (labels, labels.astype(np.int32)):
        assert fingerprint(digests, pixels.shape, numbers) == labelled
    assert fingerprint(digests, pixels.shape, None) == bare
    images, known = torch.from_numpy(pixels), torch.from_numpy(labels)
    assert load("x", images, known, classes=3).fingerprint == labelled
    assert load("x", images, None, classes=0).fingerprint == bare


def test_parts_of_a_set_give_the_digests_of_the_whole():
    pixels, _ = _set()
    whole = image_digests(pixels)
    assert image_digests(pixels[:2]) + image_digests(pixels[2:]) == whole
    backwards = np.ascontiguousarray(pixels[:, :, ::-1])[:, :, ::-1]  # not in order in memory
    assert image_digests(backwards) == whole


def test_every_bit_counts():
    pixels, labels = _set()
    seen = {fingerprint(image_digests(pixels), pixels.shape, labels)}
    for place in ((0, 0, 0, 0), (4, 2, 3, 3), (2, 1, 0, 3)):
        other = pixels.copy()
        other[place] ^= 1
        seen.add(fingerprint(image_digests(other), pixels.shape, labels))
    for place in (0, 4):
        other = labels.copy()
        other[place] += 1
        seen.add(fingerprint(image_digests(pixels), pixels.shape, other))
    assert len(seen) == 6
