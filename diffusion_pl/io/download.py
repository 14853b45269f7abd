"""Downloads, bounded in time and bytes, resumed, and checked against a digest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffusion_pl.addresses import masked
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import open_lock, regular, sha256_of
from diffusion_pl.names import shown

_BLOCK = 1024**2
_MIB = 1024**2
_SECONDS_BETWEEN_REPORTS = 5.0

# Statuses after which the same request may succeed a moment later; any other refusal is final.
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

# Bytes; the files that this package fetches by itself are smaller.
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


class UnwritableError(Exception):
    """The disk, not the server, is at fault."""


class _Pace:
    """Refuses a connection on which bytes only drip."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.since, self.came = time.monotonic(), 0

    def note(self, count: int) -> None:
        self.came += count
        seconds = time.monotonic() - self.since
        if seconds < self.patience.window:
            return
        if self.came < self.patience.slowest * seconds:
            raise Unreachable(f"{self.came:,} bytes came in {seconds:.0f} s")
        self.since, self.came = time.monotonic(), 0


def call_within(seconds: float, call: Callable[[], T]) -> T:
    """Call with a time limit; a call that takes longer goes on in a thread of its own.

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
        if not asked[-1].startswith(("https://", "http://")):
            asked[1].close()
            raise Unreachable(
                "the server redirects to something other than a web address", final=True
            )
        request, address = asked[0], asked[-1]
        further = super().redirect_request(*asked)
        # Credentials go to no other machine.
        if further is not None and _origin(address) == _origin(request.full_url):
            further.unredirected_hdrs.update(request.unredirected_hdrs)
        return further


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Args:
        start: offset in the file of the first byte sent; 0 from a server that cannot resume.
        total: bytes of the whole file, None where the server does not say.
        response: the open connection.
        patience: of its blocks.
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
        pace, came = _Pace(self.patience), self.start
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
        # http.client does not tell a truncated body from a complete one.
        if self.total is not None and came < self.total:
            raise Unreachable(f"the connection broke off: {came:,} of {self.total:,} bytes came")


@contextlib.contextmanager
def open_url(
    url: str,
    start: int = 0,
    patience: Patience = PATIENCE,
    headers: Mapping[str, str] | None = None,
) -> Iterator[Answer | None]:
    """Request a file from byte `start` on; None where the file ends there.

    Args:
        url: http or https.
        start: bytes that are here already.
        headers: such as Authorization; sent to no other machine.

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
        # Bounded as a whole, since each byte of the headers may take as long as any other.
        response = call_within(
            patience.silence + patience.window,
            lambda: opener.open(request, timeout=patience.silence),
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            # No bytes beyond `start`: the file is complete, or another one; the digest decides.
            yield None
            return
        sent_on = "" if error.url in (None, url) else f" at {masked(error.url)}"
        message = f"the server answers {error.code} {error.reason}{sent_on}"
        if error.code == 404:
            raise FileNotFoundError(message) from error
        raise Unreachable(message, final=error.code not in _TRANSIENT) from error
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
        path: of the file; its folder is made.
        sha256: hex digest the file must have.
        progress: report on stderr.
        attempts, backoff: as for `persist`.
        timeout: seconds without a byte after which a connection counts as broken; overrides the
            silence of `patience`.
        largest: bytes; a larger file is refused.

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
        if (found := sha256_of(path)) != sha256:
            raise UserError(
                f"{path}: is not the file at {url}; move it away (sha256 {found}, expected "
                f"{sha256})"
            )
        return path
    part = part_path(path)
    try:
        with claim_file(path, path.exists) as file:
            if file is None:
                return path
            with regular(part).open("rb") as earlier:  # hashed again, to be gone on with
                copy = Copy(file, largest, hashlib.file_digest(earlier, "sha256"))
            copy.done = os.fstat(file).st_size
            report = _Report(part.stem) if progress else None
            try:
                hint = f"; fetch it by other means and put it at {path}"
                persist(url, lambda: _transfer(url, copy, given, report), attempts, backoff, given,
                        done=lambda: copy.done, hint=hint)  # fmt: skip
            finally:
                os.ftruncate(file, copy.done)
                if not copy.done:
                    part.unlink(missing_ok=True)
            if (found := copy.digest.hexdigest()) != sha256:
                part.unlink()
                raise UserError(
                    f"{url}: what arrived is damaged or has changed; try again (sha256 {found}, "
                    f"expected {sha256})"
                )
            os.fsync(file)  # before the rename: a crash must leave no hole behind the name
            os.replace(part, path)
    except (OSError, UnwritableError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    return path


def part_path(path: Path) -> Path:
    """The path of a file while it is fetched."""
    return path.with_name(path.name + ".part")


@contextlib.contextmanager
def claim_file(
    path: Path,
    is_there: Callable[[], bool],
    alone: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[int | None]:
    """Lock the `.part` of a file, so that one process fetches it and others wait.

    Args:
        path: of the file; its folder is made.
        is_there: whether another process has finished it.
        alone: held while a superfluous `.part` is removed.

    Yields:
        The descriptor of the locked `.part`; None when the file is there.

    Raises:
        UserError: the `.part` is a link or not a regular file.
        OSError: the folder cannot be written or has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(path)
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
            # Another process may have given up and removed it meanwhile.
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


class Copy:
    """A file at an address on its way into a `.part`.

    Args:
        part: its descriptor.
        largest: bytes; a file of more is refused.
        digest: sha256 of what an earlier run left in it.
    """

    def __init__(self, part: int, largest: int, digest: Any = None) -> None:
        self.part, self.largest = part, largest
        self.done, self.digest = 0, digest or hashlib.sha256()

    def restart(self) -> None:
        """Begin again at the first byte."""
        self.done, self.digest = 0, hashlib.sha256()

    def write(self, start: int, blocks: Iterable[bytes]) -> None:
        """Write what a server sends from byte `start` of the file on.

        Raises:
            UnwritableError: the disk does not take it.
            Unreachable: more than `largest` bytes come.
        """
        if start != self.done:  # a server that only sends whole files
            self.restart()
        for block in blocks:
            if self.done + len(block) > self.largest:
                self.restart()
                raise Unreachable(f"it has more than {self.largest:,} bytes", final=True)
            try:
                if os.pwrite(self.part, block, self.done) < len(block):
                    raise UnwritableError("the disk is full")
            except OSError as error:
                raise UnwritableError(error.strerror) from error
            self.digest.update(block)
            self.done += len(block)


def persist(
    url: str,
    ask: Callable[[], T],
    attempts: int,
    backoff: float,
    patience: Patience,
    *,
    done: Callable[[], int] = lambda: 0,
    hint: str = "",
) -> T:
    """Ask a server until it answers.

    Args:
        url: for messages.
        ask: asks once.
        attempts: in a row that bring (next to) nothing, before the server is given up.
        backoff: seconds before the second of them, doubled each time.
        patience: with the server.
        done: bytes that have come so far.
        hint: end of the message.

    Raises:
        UnwritableError: as `ask`.
        UserError: the server was given up, or refuses.
    """
    asked, idle, since, before = 0, 0, time.monotonic(), done()
    while True:
        begun = time.monotonic()
        asked += 1
        try:
            return ask()
        except (UnwritableError, UserError):
            raise
        except FileNotFoundError as error:
            raise UserError(f"{url}: the server has no such file ({error}){hint}") from error
        except Exception as error:  # every kind of server has a library with errors of its own
            problem = error
        came, before = done() - before, done()
        # A server that breaks off after a few bytes each time gets on no more than a silent one.
        if came > patience.slowest * (time.monotonic() - begun):
            idle, since = 0, time.monotonic()
        else:
            idle += 1
        out_of_patience = idle and time.monotonic() - since > patience.total
        if getattr(problem, "final", False) or idle >= attempts or out_of_patience:
            # Libraries quote addresses, also those that they were sent on to, which are signed.
            lines = masked(str(problem)).splitlines() or [""]
            raise UserError(
                f"{url}: cannot be fetched in {asked} attempts ({type(problem).__name__}: "
                f"{lines[0]}){hint}"
            ) from problem
        time.sleep(backoff * 2 ** max(0, idle - 1))


def _transfer(url: str, copy: Copy, patience: Patience, report: _Report | None) -> None:
    """One connection, after which the copy is whole."""
    with open_url(url, copy.done, patience) as answer:
        if answer is None:
            return
        if (answer.total or 0) > copy.largest:
            raise Unreachable(f"it has more than {copy.largest:,} bytes", final=True)
        if answer.start != copy.done:
            os.ftruncate(copy.part, 0)
        copy.write(answer.start, answer.blocks() if report is None else report(copy, answer))


class _Report:
    """A line on stderr every few seconds."""

    def __init__(self, name: str) -> None:
        self.name, self.last = name, time.monotonic()

    def __call__(self, copy: Copy, answer: Answer) -> Iterator[bytes]:
        of = "" if answer.total is None else f" of {answer.total / _MIB:.0f}"
        for block in answer.blocks():
            yield block
            if time.monotonic() - self.last > _SECONDS_BETWEEN_REPORTS:
                self.last = time.monotonic()
                print(shown(f"{self.name}: {copy.done / _MIB:.0f}{of} MiB"), file=sys.stderr)
