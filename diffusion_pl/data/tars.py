"""The shards of a data set as files, here or at an address, read by offset."""

from __future__ import annotations

import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_pl.data.remote import Cache
from diffusion_pl.data.shard_format import Manifest

# Files a process keeps open for one resolution; a thousand is a common limit for all of it.
OPEN_FILES = 128

# Shards fetched at a time where a batch wants several.
_CONNECTIONS = 8


class _Descriptor:
    """An open file, closed when nobody reads it any more: threads may still do so when it is
    dropped. A fork shares it safely, since reads name their offset."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@dataclass
class Tars:
    """The shards of a data set as files.

    Args:
        where: folder or address of the data set.
        manifest: of the data set.
        cache: of remote shards; None: `where` is a folder.
    """

    where: str
    manifest: Manifest
    cache: Cache | None = None
    _open: OrderedDict[int, _Descriptor] = field(default_factory=OrderedDict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def name(self, number: int) -> str:
        """A shard as a complaint names it."""
        return f"{self.where.rstrip('/')}/{self.manifest.shards[number].file}"

    def fetch(self, numbers: list[int]) -> None:
        """Have remote shards on the disk, several at a time."""
        cache = self.cache
        if cache is None:
            return
        missing = [number for number in numbers if not cache.has(self._cached(number))]
        if len(missing) < 2:
            return
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(self._path, missing))

    def read(self, number: int, buffers: list[Any], offset: int) -> int:
        """Fill writable buffers, one after the other, from a shard; how many bytes there were.

        Raises:
            ValueError: the file cannot be read.
        """
        if offset > self.manifest.shards[number].bytes:  # perhaps more than the system counts to
            return 0
        try:
            return os.preadv(self._descriptor(number).number, buffers, offset)
        except OSError as error:
            raise ValueError(f"{self.name(number)}: cannot be read ({error.strerror})") from error

    def _descriptor(self, number: int) -> _Descriptor:
        # Every operation on the table is a single one, so threads need no lock.
        found = self._open.pop(number, None)
        if found is None:
            self._drop_removed()
        while found is None:
            try:
                found = _Descriptor(self._path(number))
            except FileNotFoundError:
                # Another process made room between fetching and opening.
                if self.cache is None:
                    raise
        self._open[number] = found
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return found

    def _drop_removed(self) -> None:
        """Close what was removed from the cache, which takes its room until then."""
        for number, descriptor in list(self._open.items()):
            if os.fstat(descriptor.number).st_nlink == 0:
                self._open.pop(number, None)

    def _cached(self, number: int) -> str:
        return f"{self.manifest.shards[number].sha256}.tar"

    def _path(self, number: int) -> Path:
        shard = self.manifest.shards[number]
        if self.cache is None:
            return Path(self.where) / shard.file
        return self.cache.fetch(self.name(number), self._cached(number), shard.bytes, shard.sha256)
