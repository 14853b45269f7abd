"""The shards of a data set as open files, local or in the cache, read by offset."""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_pl.data.shard_format import Manifest
from diffusion_pl.errors import UserError
from diffusion_pl.io.cache import Cache
from diffusion_pl.io.files import regular

# Files that a process may keep open for one resolution; more where the system's limit, commonly
# 1,024 a process, can be raised.
OPEN_FILES = 128

_PARTS = 8  # of the limit, one for a resolution

# Shards fetched at a time where a batch wants several.
_CONNECTIONS = 8


class _Descriptor:
    """An open file, closed with its last reference: a thread may still read it when it is dropped.

    A fork can share it, since every read names its offset.
    """

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
    _most: int | None = field(default=None, repr=False)  # files open at a time

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_most": None}

    def name(self, number: int) -> str:
        """A shard's path or address, for messages."""
        return f"{self.where.rstrip('/')}/{self.manifest.shards[number].file}"

    def fetch(self, numbers: list[int]) -> None:
        """Fetch remote shards that are not in the cache, several at a time."""
        cache = self.cache
        if cache is None:
            return
        missing = [n for n in numbers if not cache.has(*self._cached(n))]
        if len(missing) < 2:
            return
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(self._path, missing))

    def read(self, number: int, buffers: list[Any], offset: int) -> int:
        """Fill writable buffers, one after the other, from a shard; returns the bytes read.

        Raises:
            UserError: the file cannot be read.
        """
        if offset > self.manifest.shards[number].bytes:  # may exceed what the system accepts
            return 0
        try:
            return os.preadv(self._descriptor(number).number, buffers, offset)
        except OSError as error:
            raise UserError(f"{self.name(number)}: cannot be read ({error.strerror})") from error

    def _descriptor(self, number: int) -> _Descriptor:
        # Every operation on the table is a single one, so threads need no lock.
        found = self._open.pop(number, None)
        if found is None and self.cache is not None:
            self._drop_removed()
        while found is None:
            try:
                found = _Descriptor(self._path(number))
            except FileNotFoundError:
                # Another process made room between fetching and opening.
                if self.cache is None:
                    raise
            except OSError as error:
                # Other parts of this process have many files open.
                if error.errno != errno.EMFILE or not self._open:
                    raise
                self._most = max(1, len(self._open) // 2)
                self._close_beyond(self._most)
        self._open[number] = found
        if self._most is None:
            self._most = OPEN_FILES + _allowed(len(self.manifest.shards) - OPEN_FILES)
        self._close_beyond(self._most)
        return found

    def _close_beyond(self, most: int) -> None:
        """Keep the files open that were read last."""
        while len(self._open) > most:
            self._open.popitem(last=False)

    def renew(self, number: int) -> bool:
        """Drop a damaged shard from the cache; whether the next read may give other bytes."""
        if self.cache is None:
            return False
        name, _ = self._cached(number)
        found = self._open.pop(number, None)
        if self.cache.drop_damaged(name, self.manifest.shards[number].sha256):
            return True
        try:
            there = os.stat(self.cache.folder / name)
            return found is not None and not os.path.samestat(os.fstat(found.number), there)
        except OSError:
            return True

    def _drop_removed(self) -> None:
        """Close files removed from the cache, which take up space until then."""
        for number, descriptor in list(self._open.items()):
            if os.fstat(descriptor.number).st_nlink == 0:
                self._open.pop(number, None)

    def _cached(self, number: int) -> tuple[str, int]:
        shard = self.manifest.shards[number]
        return f"{shard.sha256}.tar", shard.bytes

    def _path(self, number: int) -> Path:
        shard = self.manifest.shards[number]
        if self.cache is None:
            return regular(Path(self.where) / shard.file)
        return self.cache.fetch(self.name(number), *self._cached(number), shard.sha256)


def _allowed(more: int) -> int:
    """How many more files this process may open, of `more` that it could use."""
    if more <= 0:
        return 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return more
    wanted = soft + more if hard == resource.RLIM_INFINITY else min(hard, soft + more)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        wanted = soft
    # Where it cannot be raised, a part of it: there are several resolutions, and other files.
    return min(more, wanted - soft + soft // _PARTS)
