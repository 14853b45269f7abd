"""What every kind of data looks like: a source to prepare and open, and the images it opens."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion_pl import ranks
from diffusion_pl.data.crops import Crop
from diffusion_pl.data.fingerprint import fingerprint, image_digests
from diffusion_pl.data.means import block_means
from diffusion_pl.errors import UserError
from diffusion_pl.names import shown

# Decoded images up to this many bytes are held in memory, more are read again on demand.
MEMORY_LIMIT = 2 * 1024**3

# Images are read through in pieces of about this many decoded bytes, so any number fits.
PIECE_BYTES = 16 * 1024**2

_SECONDS_BETWEEN_REPORTS = 10.0


class Store(Protocol):
    """Random access to decoded images; a uint8 tensor (N, C, H, W) is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W), known without decoding."""

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """uint8 (n, C, H, W), the images at int64 `indices` (n,) in [0, N)."""


@dataclass(frozen=True, eq=False)
class Images:
    """A fixed, ordered set of square images with optional labels.

    Args:
        name: names the set wherever a number measured on it is printed.
        store: the images, uint8 (N, C, R, R).
        fingerprint: sha256 (hex) of shape, pixels in order and labels, as `fingerprint` defines it;
            equal content has an equal one, whatever files it came from.
        labels: int64 (N,) in [0, classes), or None when unlabelled.
        classes: number of classes, 0 when unlabelled.
        shards: images in each shard, in order; () where there are none.
        window: shards to shuffle together; 0: all.
        file_of: names the file that an image is read from; None where it lies in memory.
        class_names: of the classes in order, () where they have none.
    """

    name: str
    store: Store
    fingerprint: str
    labels: Tensor | None
    classes: int
    shards: tuple[int, ...] = ()
    window: int = 0
    file_of: Callable[[int], str] | None = None
    class_names: tuple[str, ...] = ()

    def whence(self, index: int) -> str:
        """Where an image comes from, in words."""
        return self.name if self.file_of is None else self.file_of(index)

    def __len__(self) -> int:
        return self.store.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, R, R) of an image."""
        channels, height, width = self.store.shape[1:]
        return channels, height, width

    @property
    def channels(self) -> int:
        """Colour channels of an image."""
        return self.store.shape[1]

    @property
    def resolution(self) -> int:
        """Side of an image in pixels."""
        return self.store.shape[3]

    def read(self, indices: Tensor) -> Tensor:
        """Images by index, in the order asked for.

        Args:
            indices: int64 (n,), each in [0, N), repeats allowed.

        Returns:
            uint8 (n, C, R, R), values 0..255.
        """
        if isinstance(self.store, Tensor):
            # Whole images are copied at a time, in a twentieth of the time of indexing.
            return self.store.index_select(0, indices)
        return self.store[indices]


class Source(Protocol):
    """What the `data` node of an experiment builds: one kind of data with its loader settings."""

    @property
    def resolution(self) -> int:
        """Side of the images in pixels; of the largest where there are several."""

    @property
    def channels(self) -> int:
        """Colour channels of the images."""

    @property
    def batch_size(self) -> int:
        """Images per optimizer step, over all devices."""

    @property
    def workers(self) -> int:
        """Loader workers per device; 0 reads in the training process."""

    @property
    def hflip(self) -> bool:
        """Whether the loader mirrors each image left to right with probability one half."""

    @property
    def shares(self) -> Mapping[int, float] | None:
        """Share of the steps that each resolution gets; None: all at `resolution`."""

    @property
    def crop(self) -> Crop | None:
        """What window of each image a step sees; None: the whole."""

    def prepare(self) -> None:
        """Make the data readable on this node: download or check; a second call changes nothing.

        Raises:
            UserError: the data is absent or unfit, in one line.
        """

    def open(self, resolution: int | None = None) -> Images:
        """The images, checked; the same ones in the same order at any resolution.

        Args:
            resolution: side in pixels, up to the source's own, which None means.

        Raises:
            UserError: the data is absent, damaged or unfit, in one line.
        """


def load(
    name: str,
    store: Store,
    labels: Tensor | None,
    *,
    classes: int,
    class_names: Sequence[str] = (),
    threads: int = 1,
    limit: int | None = None,
) -> Images:
    """Read a store through once: this checks every image, takes the fingerprint, and fills memory.

    Args:
        name: the name of the set.
        store: images on demand, uint8 (N, C, R, R); a tensor is kept as it is.
        labels: int64 (N,) or None.
        classes: number of classes, 0 without labels.
        class_names: of the classes in order, where they have names.
        threads: pieces read at a time; decoding and numpy release the interpreter lock.
        limit: decoded bytes to hold in memory at most; None: MEMORY_LIMIT.

    Returns:
        The images, in memory up to the limit, else with their store.

    Raises:
        UserError: whatever the store finds wrong with an image.
    """
    count, channels, height, width = store.shape
    assert height == width and count > 0, store.shape
    digests = bytearray()
    most = MEMORY_LIMIT if limit is None else limit
    in_memory = isinstance(store, Tensor) or count * channels * height * width <= most
    kept: Store = store
    if in_memory and not isinstance(store, Tensor):
        kept = torch.empty((count, channels, height, width), dtype=torch.uint8)
    reported = time.monotonic()
    for first, piece in _pieces(store, threads=threads):
        digests += image_digests(piece.numpy())
        if kept is not store:
            assert isinstance(kept, Tensor)
            kept[first : first + len(piece)] = piece
        # One process of a node speaks for all of them.
        if ranks.leads_machine() and time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            print(
                f"{shown(name)}: {first + len(piece):,} of {count:,} images read", file=sys.stderr
            )
    identity = fingerprint(bytes(digests), store.shape, None if labels is None else labels.numpy())
    return Images(name, kept, identity, labels, classes, class_names=tuple(class_names))


@dataclass(frozen=True)
class _Reduced:
    """Another store's images with every block of pixels replaced by its mean."""

    store: Store
    resolution: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.store.shape[:2], self.resolution, self.resolution)

    def __getitem__(self, indices: Tensor) -> Tensor:
        return block_means(self.store[indices], self.resolution)


def reduced(images: Images, resolution: int | None, *, threads: int = 1) -> Images:
    """The same images smaller, by exact means over blocks of pixels.

    Args:
        images: at their own resolution.
        resolution: side of the result; None leaves the images as they are.
        threads: as for `load`.

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
    store = _Reduced(images.store, resolution)
    return load(
        name,
        store,
        images.labels,
        classes=images.classes,
        class_names=images.class_names,
        threads=threads,
    )


def _pieces(store: Store, *, threads: int) -> Iterator[tuple[int, Tensor]]:
    """The store in order as (index of the first image, images), `threads` pieces in flight."""
    count, *image = store.shape
    length = max(1, PIECE_BYTES // (image[0] * image[1] * image[2]))
    starts = range(0, count, length)
    if threads <= 1:
        for first in starts:
            yield first, store[torch.arange(first, min(first + length, count))]
        return
    with ThreadPoolExecutor(threads) as pool:
        # Rounds of `threads` pieces: submitting all at once would pile up decoded images.
        for start in range(0, len(starts), threads):
            around = starts[start : start + threads]
            indices = [torch.arange(first, min(first + length, count)) for first in around]
            yield from zip(around, pool.map(store.__getitem__, indices), strict=True)
