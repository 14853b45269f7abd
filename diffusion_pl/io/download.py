"""Read addresses, bounded in time and bytes; fetch files of known digest, resumed and checked."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffusion_pl.addresses import masked
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import open_lock, sha256_of
from diffusion_pl.names import shown

_BLOCK = 1024**2
_MIB = 1024**2
_SECONDS_BETWEEN_REPORTS = 5.0

# Answers that may be different a moment later; any other refusal is final.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})

# No file that this package fetches by itself is larger.
_LARGEST = 1024**3

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a server may take.

    Args:
        silence: seconds without a byte after which a connection counts as broken.
        slowest: bytes a second, on average over `window`, below which it does too.
        window: seconds.
        total: seconds without progress, over all connections, until a server is given up.
    """

    silence: float = 20.0
    slowest: int = 1024
    window: float = 20.0
    total: float = 60.0


PATIENCE = Patience()


class Unreachable(Exception):
    """A server does not give what it was asked for; `final` where asking again would not help."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class Pace:
    """Sees that a connection does not only drip.

    Args:
        patience: of which the window is measured.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.since, self.came = time.monotonic(), 0

    def note(self, count: int) -> None:
        """So many bytes more have come.

        Raises:
            Unreachable: they come too slowly.
        """
        self.came += count
        seconds = time.monotonic() - self.since
        if seconds < self.patience.window:
            return
        if self.came < self.patience.slowest * seconds:
            raise Unreachable(f"{self.came:,} bytes came in {seconds:.0f} s")
        self.since, self.came = time.monotonic(), 0


def within(seconds: float, call: Callable[[], T]) -> T:
    """What a call gives; one that takes longer is left behind, in a thread of its own.

    Raises:
        TimeoutError: it took longer.
    """
    answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    left = threading.Event()

    def run() -> None:
        found: Any = None
        try:
            found = call()
            answer.put((found, None))
        except BaseException as error:
            answer.put((None, error))
        if left.is_set() and hasattr(found, "close"):
            found.close()

    threading.Thread(target=run, daemon=True).start()
    try:
        found, error = answer.get(timeout=seconds)
    except queue.Empty:
        left.set()
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    result: T = found
    return result


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to other web addresses alone."""

    def redirect_request(self, *asked: Any) -> urllib.request.Request | None:
        """As urllib's own, which would also go to ftp."""
        if not asked[-1].startswith(("https://", "http://")):
            asked[1].close()
            raise Unreachable("the server redirects to what is no web address", final=True)
        request, address = asked[0], asked[-1]
        further = super().redirect_request(*asked)
        # What another machine is not to see stays with the one that it is meant for.
        if further is not None and _origin(address) == _origin(request.full_url):
            further.unredirected_hdrs.update(request.unredirected_hdrs)
        return further


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


@dataclass(frozen=True)
class Answer:
    """What a server sends.

    Args:
        start: place in the file of the first byte; 0 from a server that cannot resume.
        total: bytes of the whole file, None where the server does not say.
        response: the connection.
        patience: with it.
    """

    start: int
    total: int | None
    response: Any
    patience: Patience

    def blocks(self) -> Iterator[bytes]:
        """The bytes as they come.

        Raises:
            Unreachable: they come too slowly, or fewer than the server said.
        """
        pace, came = Pace(self.patience), self.start
        while True:
            try:
                block = self.response.read1(_BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise Unreachable("the connection broke off") from error
            if not block:
                break
            pace.note(len(block))
            came += len(block)
            yield block
        # http.client ends a body that breaks off like one that is complete.
        if self.total is not None and came < self.total:
            raise Unreachable(f"the connection broke off: {came:,} of {self.total:,} bytes came")


@contextlib.contextmanager
def opened(
    url: str,
    start: int = 0,
    patience: Patience = PATIENCE,
    headers: Mapping[str, str] | None = None,
) -> Iterator[Answer | None]:
    """What a server sends of a file from byte `start` on; None where there is nothing beyond it.

    Args:
        url: http or https.
        start: bytes that are here already.
        patience: with the server.
        headers: to send with it, such as Authorization; to no other machine.

    Raises:
        Unreachable: no answer, a refusal, or another part than was asked for.
        FileNotFoundError: the server has no such file.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "diffusion_pl"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    for name, value in (headers or {}).items():
        request.add_unredirected_header(name, value)
    opener = urllib.request.build_opener(_Redirects)
    try:
        # Each byte of an answer's head may take as long as any other.
        response = within(
            patience.silence + patience.window,
            lambda: opener.open(request, timeout=patience.silence),
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            # Nothing beyond what is here: either all of it or of another file; the digest decides.
            yield None
            return
        sent_on = "" if error.url in (None, url) else f" at {masked(error.url)}"
        message = f"the server answers {error.code} {error.reason}{sent_on}"
        if error.code == 404:
            raise FileNotFoundError(message) from error
        raise Unreachable(message, final=error.code not in _PASSING) from error
    except ValueError as error:  # no address at all
        raise Unreachable(str(error), final=True) from error
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(str(getattr(error, "reason", error))) from error
    with response:
        # A server that cannot resume answers 200 and begins again.
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise Unreachable("the server sends another part than was asked for", final=True)
        first = start if resumed else 0
        announced = response.headers.get("Content-Length", "")
        total = first + int(announced) if announced.isdigit() else None
        yield Answer(first, total, response, patience)


def fetch(
    url: str,
    path: Path,
    sha256: str,
    progress: bool = True,
    *,
    attempts: int = 5,
    backoff: float = 1.0,
    timeout: float | None = None,
    patience: Patience | None = None,
    largest: int = _LARGEST,
) -> Path:
    """Fetch `url` to `path`; a file already there with the right digest is left alone.

    What has arrived is kept in `<path>.part`, so that a second call, or a second attempt after the
    connection broke, asks only for the rest.

    Args:
        url: http or https.
        path: where the file is to lie; its folder is made.
        sha256: hex digest the file must have.
        progress: report on stderr.
        attempts: connections in a row that bring nothing before giving up.
        backoff: seconds before the second of them, doubled each time.
        timeout: seconds without a byte after which a connection counts as broken.
        patience: with the server; `timeout` overrides its silence.
        largest: bytes; a file of more is refused.

    Returns:
        `path`.

    Raises:
        UserError: no connection, a refusal, a wrong digest, or a file that cannot be written.
    """
    if not url.startswith(("https://", "http://")):
        raise UserError(f"{url}: not an http or https address")
    given = patience or PATIENCE
    given = Patience(timeout or given.silence, given.slowest, given.window, given.total)
    if path.exists():
        _check(path, sha256, f"{path}: is not the file at {url}; move it away")
        return path
    part = part_of(path)
    try:
        with claimed(path, path.exists) as taken:
            if taken is None:
                return path
            copy = _Copy(url, part, progress, given, largest)
            try:
                _complete(copy, attempts, backoff)
            finally:
                if not copy.bytes():
                    part.unlink(missing_ok=True)
            try:
                _check(part, sha256, f"{url}: what arrived is damaged or has changed; try again")
            except ValueError:
                part.unlink()
                raise
            os.replace(part, path)
    except Unreachable as error:
        raise UserError(
            f"{url}: cannot be fetched ({error}); fetch it by other means and put it at {path}"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    return path


def part_of(path: Path) -> Path:
    """Where a file lies while it is fetched."""
    return path.with_name(path.name + ".part")


@contextlib.contextmanager
def claimed(
    path: Path,
    is_there: Callable[[], bool],
    alone: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[int | None]:
    """Be the one process that fetches a file; others wait for it.

    Args:
        path: where it will lie; its folder is made.
        is_there: whether another has finished it by now.
        alone: held while a `.part` that nobody needs is removed.

    Yields:
        The descriptor of its `.part`, locked; None when the file is there.

    Raises:
        UserError: a link or no file is where the `.part` belongs.
        OSError: the folder cannot be written or has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    while True:
        file = open_lock(part)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_there():
                with alone():
                    if _is_at(file, part):
                        part.unlink()
                yield None
                return
            # While this one waited, another may have given up and removed it.
            if _is_at(file, part):
                yield file
                return
        finally:
            os.close(file)


def _is_at(opened: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), os.stat(path))
    except FileNotFoundError:
        return False


def _check(path: Path, wanted: str, complaint: str) -> None:
    if (found := sha256_of(path)) != wanted:
        raise UserError(f"{complaint} (sha256 {found}, expected {wanted})")


@dataclass(frozen=True)
class _Copy:
    """What is fetched, and how."""

    url: str
    part: Path
    progress: bool
    patience: Patience
    largest: int

    def bytes(self) -> int:
        """So many are here."""
        return self.part.stat().st_size if self.part.exists() else 0


def _complete(copy: _Copy, attempts: int, backoff: float) -> None:
    """Append to the part until the server says it is whole."""
    idle, since, before = 0, time.monotonic(), copy.bytes()
    while True:
        begun = time.monotonic()
        try:
            _transfer(copy)
            return
        except FileNotFoundError as error:
            raise Unreachable(str(error), final=True) from error
        except Unreachable as error:
            if error.final:
                raise
            problem = str(error)
        came, before = copy.bytes() - before, copy.bytes()
        # A server that breaks off after a few bytes each time gets on no more than a silent one.
        if came > copy.patience.slowest * (time.monotonic() - begun):
            idle, since = 0, time.monotonic()
        else:
            idle += 1
        if idle >= attempts or (idle and time.monotonic() - since > copy.patience.total):
            raise Unreachable(problem)
        time.sleep(backoff * 2 ** max(0, idle - 1))


def _transfer(copy: _Copy) -> None:
    """One connection, after which the part is whole.

    Raises:
        Unreachable: no answer, a refusal, one that drips or breaks off, or more than such a file
            can have.
        OSError: the part cannot be written.
    """
    with opened(copy.url, copy.bytes(), copy.patience) as answer:
        if answer is None:
            return
        done, reported = answer.start, time.monotonic()
        with copy.part.open("ab" if answer.start else "wb") as file:
            for block in answer.blocks():
                done += len(block)
                if max(done, answer.total or 0) > copy.largest:
                    raise Unreachable(f"it has more than {copy.largest:,} bytes", final=True)
                file.write(block)
                if copy.progress and time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                    reported = time.monotonic()
                    of = "" if answer.total is None else f" of {answer.total / _MIB:.0f}"
                    print(shown(f"{copy.part.stem}: {done / _MIB:.0f}{of} MiB"), file=sys.stderr)
            # On the disk before it gets its final name: a crash must leave no hole behind the name.
            file.flush()
            os.fsync(file.fileno())
