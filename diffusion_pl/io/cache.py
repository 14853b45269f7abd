"""A bounded cache on the disk for files at any address that fsspec knows.

A file is named by its digest, and gets the name when it is complete and checked, so processes can
share it. The process that fetches a file locks its `.part`, which has the final size from the start
and so counts towards the limit.
"""

from __future__ import annotations

import fcntl
import netrc
import os
import re
import stat
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diffusion_pl.addresses import MASK, instead, masked, refuse_credentials
from diffusion_pl.errors import UserError
from diffusion_pl.io.download import (
    PATIENCE,
    Copy,
    Patience,
    Unreachable,
    UnwritableError,
    call_within,
    claim_file,
    open_url,
    part_path,
    persist,
)
from diffusion_pl.io.files import open_lock, regular, sha256_of

_BLOCK = 1024**2
_SECONDS_BETWEEN_LOOKS = 0.05
_LARGEST = 128 * 1024**2  # bytes of a file that is read into memory

# Files of a cache: only these are removed, since a user's folder may hold others.
_OURS = re.compile(r"([0-9a-f]{64}\.(tar|f16)|index\.npy)(\.part)?")


def is_remote(path: str) -> bool:
    """Whether a path is an address, such as s3://bucket/cats."""
    return "://" in path


def read(
    url: str,
    largest: int = _LARGEST,
    *,
    attempts: int = 5,
    backoff: float = 1.0,
    patience: Patience | None = None,
) -> bytes | None:
    """Read a small file at an address; None where the server has no such file.

    Args:
        url: of the file.
        largest: bytes; a larger file is refused.
        attempts, backoff: as for `persist`.
        patience: with the server.

    Raises:
        UserError: an address of an unknown kind, or a server that does not send the file.
    """
    given = patience or PATIENCE

    def ask() -> bytes | None:
        found = bytearray()
        try:
            with _blocks(url, 0, given) as answer:
                for block in () if answer is None else answer[1]:
                    found += block
                    if len(found) > largest:
                        raise Unreachable(f"it has more than {largest:,} bytes", final=True)
        except FileNotFoundError:
            return None
        return bytes(found)

    _refuse_credentials(url)
    return persist(url, ask, attempts, backoff, given)


def _refuse_credentials(url: str) -> None:
    refuse_credentials(url, "data.dataset.path")
    if MASK in url:
        raise UserError(
            f"{url}: its credentials were not kept; give the address again, and set {instead(url)}"
        )


@dataclass(frozen=True)
class Cache:
    """A folder of fetched files that together take no more than so many bytes.

    Names are a digest and `.tar` or `.f16`, or `index.npy`; nothing else in the folder is removed
    to make room.

    Args:
        folder: made when it is needed.
        limit: bytes; the least recently used files make room.
        attempts, backoff: as for `persist`.
        patience: with the server; PATIENCE when not given.
    """

    folder: Path
    limit: int
    attempts: int = 5
    backoff: float = 1.0
    patience: Patience | None = None

    def has(self, name: str, size: int) -> bool:
        """Whether a file of that size is there; a link does not count."""
        try:
            state = os.lstat(self.folder / name)
        except OSError:
            return False
        return stat.S_ISREG(state.st_mode) and state.st_size == size

    def drop_damaged(self, name: str, sha256: str) -> bool:
        """Remove a file unless it has that sha256 (hex); whether it was removed or absent."""
        path = self.folder / name
        try:
            if sha256_of(path) == sha256:
                return False
        except FileNotFoundError:
            return True
        except OSError:  # the disk cannot read it any more
            pass
        with self._alone():
            path.unlink(missing_ok=True)
        return True

    def fetch(self, url: str, name: str, size: int, sha256: str) -> Path:
        """The path of a file, fetched unless it is there.

        Args:
            url: of the file.
            name: in the cache.
            size: in bytes.
            sha256: hex digest the file must have.

        Raises:
            UserError: a server that does not send that file, or a full disk.
        """
        final = self.folder / name
        if self.has(name, size):
            with suppress(OSError):
                os.utime(final)
            return final
        if size > self.limit:
            raise UserError(
                f"{url}: {size:,} bytes, and data.dataset.cache_bytes is {self.limit:,}; raise it"
            )
        try:
            with claim_file(final, lambda: self.has(name, size), self._alone) as part:
                if part is not None:
                    self._fill(part, final, url, size, sha256)
        except (OSError, UnwritableError) as error:
            problem = getattr(error, "strerror", None) or error
            raise UserError(
                f"{self.folder}: {url} cannot be kept here ({problem}); free space or set "
                f"data.dataset.cache_folder"
            ) from error
        return final

    def _fill(self, part: int, final: Path, url: str, size: int, sha256: str) -> None:
        try:
            self._reserve(part, final, size)
            patience = self.patience or PATIENCE
            copy = Copy(part, size)

            def ask() -> None:
                with _blocks(url, copy.done, patience) as answer:
                    if answer is not None:
                        copy.write(*answer)
                if copy.done < size:
                    raise ConnectionError(f"{copy.done:,} of {size:,} bytes came")
                if copy.digest.hexdigest() != sha256:
                    copy.restart()
                    raise ConnectionError("what comes has another sha256 than dataset.json says")

            _refuse_credentials(url)
            persist(url, ask, self.attempts, self.backoff, patience, done=lambda: copy.done)
            os.fsync(part)
            with self._alone():
                os.replace(part_path(final), final)
        except BaseException:
            with self._alone():
                part_path(final).unlink(missing_ok=True)
            raise

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the cache: no other process reserves or frees space, or renames a file."""
        lock = open_lock(self.folder / ".lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _reserve(self, part: int, final: Path, size: int) -> None:
        """Give a `.part` its final size once there is room for it."""
        while True:
            with self._alone():
                os.ftruncate(part, 0)
                if self._make_room(size):
                    os.ftruncate(part, size)
                    return
            # Files being fetched take all the room; they can be removed once they are complete.
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _make_room(self, size: int) -> bool:
        """Remove the least recently used files until `size` more bytes fit; whether they do."""
        found = []
        for entry in os.scandir(self.folder):
            if _OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                state = entry.stat(follow_symlinks=False)
                found.append((state.st_mtime_ns, state.st_size, Path(entry.path)))
        total = sum(bytes for _, bytes, _ in found)
        for _, bytes, path in sorted(found):
            if total + size <= self.limit:
                break
            if path.suffix != ".part" or _abandoned(path):
                # A process that has it open can still read it.
                path.unlink(missing_ok=True)
                total -= bytes
        return total + size <= self.limit


def _abandoned(part: Path) -> bool:
    """Whether the process that fetched a file is gone."""
    try:
        with regular(part).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (OSError, ValueError):
        return False


@contextmanager
def _blocks(
    url: str, start: int, patience: Patience
) -> Iterator[tuple[int, Iterator[bytes]] | None]:
    """The offset from which a server sends, and the blocks; None if there are no more.

    Raises:
        Exception: any of the server's library.
    """
    if url.startswith(("http://", "https://")):
        with open_url(url, start, patience, _headers(url)) as answer:
            yield None if answer is None else (answer.start, answer.blocks())
        return
    # Libraries for other servers have no time limit, so each call is timed.
    limit = patience.silence + patience.window
    system, path = _opened(url)
    file = call_within(limit, lambda: system.open(path, "rb", block_size=_BLOCK, cache_type="none"))
    with file:
        if start:
            try:
                file.seek(start)
            except (ValueError, OSError):
                start = 0
        yield start, iter(lambda: call_within(limit, lambda: bytes(file.read(_BLOCK))), b"")


def _headers(url: str) -> dict[str, str]:
    """The headers that a user's settings of fsspec send to web servers, or those of netrc."""
    from fsspec.config import conf

    parts = urlsplit(url)
    set_ = {**conf.get("http", {}), **conf.get("https", {})}  # fsspec treats both alike
    client = set_.get("client_kwargs", {})
    headers = {**client.get("headers", {}), **set_.get("headers", {})}
    if client.get("trust_env") and "Authorization" not in headers and parts.hostname:
        with suppress(OSError, netrc.NetrcParseError):
            known = netrc.netrc().authenticators(parts.hostname)
            if known is not None:
                pair = b64encode(f"{known[0]}:{known[2]}".encode()).decode()
                headers["Authorization"] = f"Basic {pair}"
    return {str(name): str(value) for name, value in headers.items()}


def _opened(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it."""
    # Not kept, since its event loop does not survive a fork; fsspec keeps one for each process.
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"{url}: cannot be opened ({masked(str(error))}; for s3:// pip install "
            "'diffusion_pl[remote]')"
        ) from error
    except ValueError as error:
        raise UserError(f"{url}: cannot be opened ({masked(str(error))})") from error
    return system, path
