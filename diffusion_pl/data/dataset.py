"""The protocol of data sets before they are opened, and loading of their images."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from diffusion_pl import ranks
from diffusion_pl.data.fingerprint import fingerprint, image_digests
from diffusion_pl.data.means import block_means
from diffusion_pl.errors import UserError
from diffusion_pl.images import ImageDataset, Images, Store
from diffusion_pl.names import shown

# Decoded images up to this many bytes are held in memory, more are read again on demand.
MEMORY_LIMIT = 2 * 1024**3

# Images are loaded in pieces of about this many decoded bytes.
PIECE_BYTES = 16 * 1024**2

THREADS = 8  # per process

_SECONDS_BETWEEN_REPORTS = 10.0


class DatasetSpec(Protocol):
    """What `data.dataset` of an experiment builds: which images, before any is read."""

    @property
    def resolution(self) -> int:
        """Side of the images in pixels; of the largest where there are several."""

    @property
    def channels(self) -> int:
        """Colour channels of the images."""

    def prepare(self) -> None:
        """Make the data readable on this node: download or check; a second call changes nothing.

        Raises:
            UserError: the data is absent or unfit, in one line.
        """

    def open(self, resolution: int | None = None) -> ImageDataset:
        """The images, checked; the same ones in the same order at any resolution.

        Args:
            resolution: side in pixels, up to its own, which None means.

        Raises:
            UserError: the data is absent, damaged or unfit, in one line.
        """


def load(
    name: str,
    store: Tensor | Store,
    labels: Tensor | None = None,
    *,
    classes: int = 0,
    class_names: Sequence[str] = (),
    limit: int | None = None,
) -> Images:
    """Read every image of a store once: check it, hash it, and keep it in memory if all fit.

    Args:
        name: of the set.
        store: images on demand, uint8 (N, C, R, R); a tensor is kept as it is.
        labels: int64 (N,) or None.
        classes: number of classes, 0 without labels.
        class_names: of the classes in order, where they have names.
        limit: decoded bytes that may be held in memory; None: MEMORY_LIMIT.

    Returns:
        The images, in memory up to the limit, else with their store.

    Raises:
        UserError: images, labels or names that do not fit one another, or whatever the store finds
            wrong with an image.
    """
    _check(name, store, labels, classes, class_names)
    count, channels, height, width = store.shape
    digests = bytearray()
    most = MEMORY_LIMIT if limit is None else limit
    in_memory = isinstance(store, Tensor) or count * channels * height * width <= most
    kept = store
    if in_memory and not isinstance(store, Tensor):
        kept = torch.empty((count, channels, height, width), dtype=torch.uint8)
    reported = time.monotonic()
    for first, piece in _pieces(store):
        digests += image_digests(piece.numpy())
        if kept is not store:
            assert isinstance(kept, Tensor)
            kept[first : first + len(piece)] = piece
        # One process a node reports.
        if ranks.leads_machine() and time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            print(
                f"{shown(name)}: {first + len(piece):,} of {count:,} images read", file=sys.stderr
            )
    identity = fingerprint(bytes(digests), store.shape, None if labels is None else labels.numpy())
    return Images(name, kept, identity, labels, classes, tuple(class_names))


def _check(
    name: str, store: Tensor | Store, labels: Tensor | None, classes: int, names: Sequence[str]
) -> None:
    """See that images, labels and names fit one another.

    Raises:
        UserError: they do not.
    """
    shape = tuple(store.shape)
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise UserError(f"{name}: images must be (N, C, R, R) (got {shape})")
    if isinstance(store, Tensor) and store.dtype != torch.uint8:
        raise UserError(f"{name}: images must be uint8 (got {store.dtype})")
    if names and len(names) != classes:
        raise UserError(f"{name}: {len(names)} names for {classes} classes")
    if labels is None:
        return
    if labels.shape != shape[:1] or labels.is_floating_point():
        got = f"{labels.dtype} {tuple(labels.shape)}"
        raise UserError(f"{name}: labels must be int64 ({shape[0]},), one an image (got {got})")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes and high >= classes):
        raise UserError(f"{name}: labels are {low} to {high}, and must be in [0, {classes})")


@dataclass(frozen=True)
class _Reduced:
    """Other images with every block of pixels replaced by its mean."""

    images: ImageDataset
    resolution: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.images.shape[:2], self.resolution, self.resolution)

    def read(self, indices: Tensor) -> Tensor:
        return block_means(self.images.read(indices), self.resolution)


def reduced(images: Images, resolution: int | None) -> Images:
    """Reduce images by exact means over blocks of pixels.

    Args:
        images: at their own resolution.
        resolution: side of the result; None leaves the images as they are.

    Raises:
        UserError: a resolution that does not divide the images' own.
    """
    whole = images.resolution
    if resolution is None or resolution == whole:
        return images
    if resolution < 1 or whole % resolution:
        raise UserError(
            f"{images.name}: {whole} px are reduced to a whole fraction (got {resolution})"
        )
    name = f"{images.name.removesuffix(f'-{whole}')}-{resolution}"
    store = _Reduced(images, resolution)
    labels, classes = images.labels, images.classes
    loaded = load(name, store, labels, classes=classes, class_names=images.class_names)
    return replace(loaded, texts=images.texts)


def _pieces(store: Tensor | Store) -> Iterator[tuple[int, Tensor]]:
    """Read a store in order, in threads; yields (index of the first image, images)."""
    count, *image = store.shape
    read = store.__getitem__ if isinstance(store, Tensor) else store.read
    length = max(1, PIECE_BYTES // (image[0] * image[1] * image[2]))
    starts = range(0, count, length)
    threads = min(THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        # Rounds of `threads` pieces: submitting all at once would pile up decoded images.
        for start in range(0, len(starts), threads):
            around = starts[start : start + threads]
            indices = [torch.arange(first, min(first + length, count)) for first in around]
            yield from zip(around, pool.map(read, indices), strict=True)
