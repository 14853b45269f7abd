"""Files at any address that fsspec knows, fetched whole into a bounded cache on the disk.

A file in the cache is named by its digest and gets the name when it is complete and checked: what
is there is right, and processes share it. Who fetches a file holds a lock on its `.part`, which
ends with the process; a `.part` has its final size from the start, so it counts as room taken.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffusion_pl.addresses import MASK, instead, masked, refuse_credentials

_BLOCK = 8 * 1024**2
_SECONDS_BETWEEN_LOOKS = 0.05

T = TypeVar("T")


class _Unwritable(Exception):
    """The cache, not the server, is at fault."""


class _Unusable(Exception):
    """An address that nothing here can open."""


def is_remote(path: str) -> bool:
    """Whether a path is an address, such as s3://bucket/cats."""
    return "://" in path


def read(url: str, *, attempts: int = 5, backoff: float = 1.0) -> bytes | None:
    """A small file at an address; None where the server says there is none.

    Raises:
        ValueError: an address of an unknown kind, or a server that does not give the file.
    """

    def ask() -> bytes | None:
        system, path = _opened(url)
        try:
            return bytes(system.cat_file(path))
        except FileNotFoundError:
            return None

    return _persist(url, ask, attempts, backoff)


@dataclass(frozen=True)
class Cache:
    """A folder of fetched files that together take no more than so many bytes.

    Args:
        folder: where; made when it is needed.
        limit: bytes; the files that were not opened for longest make room.
        attempts: connections before a server is given up.
        backoff: seconds before the second of them, doubled each time.
    """

    folder: Path
    limit: int
    attempts: int = 5
    backoff: float = 1.0

    def has(self, name: str) -> bool:
        """Whether a file is there now."""
        return (self.folder / name).exists()

    def fetch(self, url: str, name: str, size: int, sha256: str) -> Path:
        """The file of an address on the disk, fetched unless it is there.

        Args:
            url: of the file.
            name: in the cache.
            size: in bytes.
            sha256: hex digest the file must have.

        Raises:
            ValueError: a server that does not give that file, or a disk that does not take it.
        """
        final = self.folder / name
        if final.exists():
            with suppress(OSError):
                os.utime(final)
            return final
        if size > self.limit:
            raise ValueError(
                f"{url}: {size:,} bytes, and data.cache_bytes is {self.limit:,}; raise it"
            )
        try:
            with self._claimed(final) as part:
                if part is not None:
                    self._fill(part, final, url, size, sha256)
        except (OSError, _Unwritable) as error:
            problem = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{self.folder}: {url} cannot be kept here ({problem}); free space or set "
                f"data.cache_folder"
            ) from error
        return final

    @contextmanager
    def _claimed(self, final: Path) -> Iterator[int | None]:
        """The `.part` of a file, locked and open; None when another process has finished it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = _part_of(final)
        while True:
            part = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(part, fcntl.LOCK_EX)
                if final.exists():
                    with self._alone():
                        if _is_at(part, path):
                            path.unlink()
                    yield None
                    return
                # While this one waited, another may have given up and removed it.
                if _is_at(part, path):
                    yield part
                    return
            finally:
                os.close(part)

    def _fill(self, part: int, final: Path, url: str, size: int, sha256: str) -> None:
        try:
            self._reserve(part, final, size)
            _persist(url, _Copy(part, url, size, sha256), self.attempts, self.backoff)
            os.fsync(part)
            with self._alone():
                os.replace(_part_of(final), final)
        except BaseException:
            with self._alone():
                _part_of(final).unlink(missing_ok=True)
            raise

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else takes room, gives it back or renames a file: sizes can be added up."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _reserve(self, part: int, final: Path, size: int) -> None:
        """Give a `.part` its size once there is room for it."""
        while True:
            with self._alone():
                os.ftruncate(part, 0)
                if self._make_room(size):
                    os.ftruncate(part, size)
                    return
            # All room is taken by files on their way, which can be removed once they are whole.
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _make_room(self, size: int) -> bool:
        """Remove what was not used for longest until `size` bytes more are within the limit."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name != ".lock" and entry.is_file():
                state = entry.stat()
                found.append((state.st_mtime_ns, state.st_size, Path(entry.path)))
        total = sum(bytes for _, bytes, _ in found)
        for _, bytes, path in sorted(found):
            if total + size <= self.limit:
                break
            if path.suffix != ".part" or _abandoned(path):
                # Whoever has it open reads on.
                path.unlink(missing_ok=True)
                total -= bytes
        return total + size <= self.limit


def _part_of(final: Path) -> Path:
    return final.with_name(final.name + ".part")


def _is_at(opened: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), os.stat(path))
    except FileNotFoundError:
        return False


def _abandoned(part: Path) -> bool:
    """Whether the process that fetched a file is gone."""
    try:
        with part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


class _Copy:
    """Copies a file at an address; called again, it goes on where it broke off."""

    def __init__(self, part: int, url: str, size: int, sha256: str) -> None:
        self.part, self.url, self.size, self.sha256 = part, url, size, sha256
        self.done = 0
        self.digest = hashlib.sha256()

    def __call__(self) -> None:
        """Ask for what is missing.

        Raises:
            Exception: what the server's library raises, or for what arrived.
        """
        system, path = _opened(self.url)
        with system.open(path, "rb", block_size=_BLOCK, cache_type="none") as file:
            if self.done:
                self._go_on(file)
            while block := file.read(_BLOCK):
                self._write(block)
        if self.done < self.size:
            raise ConnectionError(f"{self.done:,} of {self.size:,} bytes came")
        if self.done > self.size or self.digest.hexdigest() != self.sha256:
            self._restart()
            raise ConnectionError("what comes has another sha256 than dataset.json says")

    def _go_on(self, file: Any) -> None:
        try:
            file.seek(self.done)
        except (ValueError, OSError):
            # A server that only sends whole files.
            self._restart()

    def _restart(self) -> None:
        self.done, self.digest = 0, hashlib.sha256()

    def _write(self, block: bytes) -> None:
        try:
            if os.pwrite(self.part, block, self.done) < len(block):
                raise _Unwritable("the disk is full")
        except OSError as error:
            raise _Unwritable(error.strerror) from error
        self.digest.update(block)
        self.done += len(block)


def _opened(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it."""
    # Its event loop does not survive a fork: ask anew each time, fsspec keeps one a process.
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        raise _Unusable(
            f"{masked(str(error))}; for s3:// pip install 'diffusion_pl[remote]'"
        ) from error
    except ValueError as error:
        raise _Unusable(masked(str(error))) from error
    return system, path


def _persist(url: str, ask: Callable[[], T], attempts: int, backoff: float) -> T:
    """Ask a server until it answers.

    Raises:
        _Unwritable: as `ask`.
        ValueError: it does not.
    """
    refuse_credentials(url, "data.path")
    if MASK in url:
        raise ValueError(
            f"{url}: its credentials are not kept; name it anew, and set {instead(url)}"
        )
    problem: Exception | None = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(backoff * 2 ** (attempt - 1))
        try:
            return ask()
        except _Unwritable:
            raise
        except _Unusable as error:
            raise ValueError(f"{url}: cannot be opened ({error})") from error
        except FileNotFoundError as error:
            raise ValueError(f"{url}: the server has no such file") from error
        except Exception as error:
            # Every kind of server has a library with errors of its own.
            problem = error
    # Libraries quote addresses, also those that they were sent on to, which are signed.
    lines = masked(str(problem)).splitlines() or [""]
    raise ValueError(
        f"{url}: cannot be fetched in {attempts} attempts ({type(problem).__name__}: {lines[0]})"
    ) from problem
