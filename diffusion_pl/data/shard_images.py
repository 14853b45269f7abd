"""Images of prepared shards: members of tars, read at the offsets in the index."""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion_pl.data.member_images import RAW_HEADER, decode_into, raw_header
from diffusion_pl.data.shard_format import ENDINGS, open_index
from diffusion_pl.data.tars import Tars
from diffusion_pl.errors import UserError
from diffusion_pl.images import ImageDataset, Texts
from diffusion_pl.names import plain

_TAR_BLOCK = 512


class BrokenImage(UserError):
    """A member that is not the image that the index states."""


@dataclass
class ShardImages(ImageDataset):
    """The images of prepared shards at one resolution: read and decoded when asked for.

    Args:
        tars: the shards.
        folder: where the index lies.
        side: in pixels, one of the manifest's resolutions.
        window: shards to shuffle together; 0: all.
        skip_broken: how many broken images this process may replace, each by the next good one of
            the same label.
        labels: int64 (N,), checked by `Shards`.
        texts: captions and their token states, where they are read.
        decoded: all images, uint8 (N, C, R, R), where they are held in memory.
    """

    tars: Tars
    folder: Path
    side: int
    window: int = 0
    skip_broken: int = 0
    labels: Tensor | None = None
    texts: Texts | None = None
    decoded: Tensor | None = field(default=None, repr=False)
    _broken: set[int] = field(default_factory=set, repr=False)
    _stand_ins: dict[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        manifest = self.tars.manifest
        self.name = f"{plain(manifest.name)}-{self.side}"
        self.fingerprint = manifest.fingerprints[self.side]
        self.classes = manifest.classes
        self.class_names = tuple(manifest.class_names or ())
        self.shards = tuple(shard.count for shard in manifest.shards)

    def __getstate__(self) -> dict[str, Any]:
        # Each process maps the index by itself.
        return {key: value for key, value in self.__dict__.items() if key != "index"}

    @cached_property
    def index(self) -> npt.NDArray[np.void]:
        """The index, mapped from the disk."""
        return open_index(self.folder, self.tars.manifest)

    @cached_property
    def _header(self) -> bytes:
        return raw_header(self.shape[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, R, R)."""
        manifest = self.tars.manifest
        return (manifest.count, manifest.channels, self.side, self.side)

    def origin(self, index: int) -> str:
        """The shard that holds an image."""
        return self.tars.name(int(self.index["shard"][index]))

    @property
    def broken(self) -> int:
        """How many images have been replaced in this process."""
        return len(self._broken)

    def stand_ins(self, indices: Tensor) -> Tensor:
        """The images that this process has read in the place of these."""
        if not self._stand_ins:
            return indices
        return torch.tensor([self._stand_ins.get(index, index) for index in indices.tolist()])

    def read(self, indices: Tensor) -> Tensor:
        """uint8 (n, C, R, R).

        Raises:
            UserError: an image that is broken, by shard and key, or one more than `skip_broken`.
        """
        if self.decoded is not None:
            return self.decoded.index_select(0, indices)
        images = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)
        rows = self.index[indices.numpy()]
        self.tars.fetch(np.unique(rows["shard"]).tolist())
        # In the order of the disk.
        places = np.lexsort((rows[f"offset_{self.side}"], rows["shard"]))
        columns = zip(places.tolist(), *self._columns(rows[places]), strict=True)
        for place, number, offset, length, crc in columns:
            try:
                self._again_if_damaged(images[place], number, offset, length, crc)
            except BrokenImage as error:
                self._replace(images[place], int(indices[place]), error)
        return torch.from_numpy(images)

    def _columns(self, rows: npt.NDArray[np.void]) -> list[list[int]]:
        names = ["shard", *(f"{name}_{self.side}" for name in ("offset", "length", "crc"))]
        return [rows[name].tolist() for name in names]

    def _again_if_damaged(
        self, image: npt.NDArray[np.uint8], number: int, offset: int, length: int, crc: int
    ) -> None:
        """Read an image; again where its shard in the cache was damaged and is fetched anew."""
        try:
            self._read(image, number, offset, length, crc)
        except ValueError:  # broken, or the disk cannot read it any more
            if not self.tars.renew(number):
                raise
            self._read(image, number, offset, length, crc)

    def _read(
        self, image: npt.NDArray[np.uint8], number: int, offset: int, length: int, crc: int
    ) -> None:
        """Read and decode an image; uncompressed pixels are read to where they belong."""
        encoding = self.tars.manifest.encoding
        raw = encoding == "raw"
        wanted = RAW_HEADER + image.size
        if raw and length != wanted:
            raise self._complaint(number, offset, f"{length} bytes in place of {wanted}")
        if not 0 < length <= self.tars.manifest.shards[number].bytes:
            raise self._complaint(number, offset, f"{length} bytes long in the index")
        data = bytearray(RAW_HEADER if raw else length)
        if self.tars.read(number, [data, image] if raw else [data], offset) != length:
            raise self._complaint(number, offset, "the shard ends within it")
        if zlib.crc32(image.data if raw else b"", zlib.crc32(data)) != crc:
            raise self._complaint(number, offset, "its check sum is wrong")
        if raw:
            if data != self._header:
                raise self._complaint(number, offset, "not the array it should be")
            return
        try:
            decode_into(image, data, encoding)
        except ValueError as error:
            raise self._complaint(number, offset, str(error)) from error

    def _complaint(self, number: int, offset: int, problem: str) -> BrokenImage:
        """The error, with the member's name from the tar header before its contents."""
        block = bytearray(_TAR_BLOCK)
        self.tars.read(number, [block], max(0, offset - _TAR_BLOCK))
        name = bytes(block[:100]).split(b"\0")[0].decode("ascii", "replace")
        ending = f".{self.side}.{ENDINGS[self.tars.manifest.encoding]}"
        if not (name.endswith(ending) and name.isprintable()):
            name = f"byte {offset:,}"
            problem = f"no {self.side} px image where the index has one"
        return BrokenImage(
            f"{self.tars.name(number)}: {name}: {problem}; fetch or prepare the data again, or "
            f"set data.dataset.skip_broken"
        )

    def _replace(self, image: npt.NDArray[np.uint8], broken: int, complaint: BrokenImage) -> None:
        """Put the next good image of the same label in the place of a broken one."""
        if self.skip_broken == 0:
            raise complaint
        self._note(broken, complaint)
        for other in self._next(broken):
            [number], [offset], [length], [crc] = self._columns(self.index[other : other + 1])
            try:
                self._read(image, number, offset, length, crc)
            except BrokenImage as error:
                self._note(other, error)
            else:
                self._stand_ins[broken] = other
                return
        raise complaint

    def _next(self, place: int) -> Iterator[int]:
        label = self.index["label"]
        for other in itertools.chain(range(place + 1, len(label)), range(place)):
            if label[other] == label[place]:
                yield other

    def _note(self, broken: int, complaint: BrokenImage) -> None:
        first = not self._broken
        self._broken.add(broken)
        if len(self._broken) > self.skip_broken:
            raise UserError(
                f"{len(self._broken)} broken images, data.dataset.skip_broken is "
                f"{self.skip_broken}: {complaint}"
            ) from complaint
        if first:
            warnings.warn(f"replaced by the next good image: {complaint}", stacklevel=4)
