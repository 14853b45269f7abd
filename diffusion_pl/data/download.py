"""Fetch a file whose digest is known: resumable, checked, and in place only when complete."""

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from diffusion_pl.names import shown

_BLOCK = 1024**2
_MIB = 1024**2
_SECONDS_BETWEEN_REPORTS = 5.0

# Answers that may be different a moment later; any other refusal is final.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


def fetch(
    url: str,
    path: Path,
    sha256: str,
    progress: bool = True,
    *,
    attempts: int = 5,
    backoff: float = 1.0,
    timeout: float = 20.0,
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

    Returns:
        `path`.

    Raises:
        ValueError: no connection, a refusal, a wrong digest, or a file that cannot be written.
    """
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"{url}: not an http or https address")
    if path.exists():
        _check(path, sha256, f"{path}: is not the file at {url}; move it away")
        return path
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _complete(url, part, progress=progress, attempts=attempts, backoff=backoff, timeout=timeout)
        try:
            _check(part, sha256, f"{url}: what arrived is damaged or has changed; try again")
        except ValueError:
            part.unlink()
            raise
        os.replace(part, path)
    except _Unreachable as error:
        raise ValueError(
            f"{url}: cannot be fetched ({error}); fetch it by other means and put it at {path}"
        ) from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error})") from error
    return path


class _Unreachable(Exception):
    """The server did not give the file; `final` where asking again would not help."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def _check(path: Path, sha256: str, complaint: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{complaint} (sha256 {found}, expected {sha256})")


def _complete(
    url: str, part: Path, *, progress: bool, attempts: int, backoff: float, timeout: float
) -> None:
    """Append to `part` until the server says it is whole."""
    idle = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _transfer(url, part, progress=progress, timeout=timeout):
                return
            problem = "the connection broke off"
        except _Unreachable as error:
            if error.final:
                raise
            problem = str(error)
        idle = 0 if part.exists() and part.stat().st_size > before else idle + 1
        if idle >= attempts:
            raise _Unreachable(problem)
        time.sleep(backoff * 2 ** max(0, idle - 1))


def _transfer(url: str, part: Path, *, progress: bool, timeout: float) -> bool:
    """One connection: whether `part` is whole after it.

    Raises:
        _Unreachable: no answer, a refusal, or another part than was asked for.
        OSError: `part` cannot be written.
    """
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "diffusion_pl"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            # Nothing beyond what is here: either all of it or of another file; the digest decides.
            return True
        message = f"the server answers {error.code} {error.reason}"
        raise _Unreachable(message, final=error.code not in _PASSING) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Unreachable(str(getattr(error, "reason", error))) from error
    with answer:
        # A server that cannot resume answers 200 and begins again.
        resumed = answer.status == 206
        if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise _Unreachable("the server sends another part than was asked for", final=True)
        return _receive(answer, part, start if resumed else 0, progress=progress)


def _receive(answer: http.client.HTTPResponse, part: Path, start: int, *, progress: bool) -> bool:
    """Write an answer to `part` from byte `start` on: whether all of it came."""
    announced = answer.headers.get("Content-Length", "")
    total = start + int(announced) if announced.isdigit() else None
    done, reported = start, time.monotonic()
    with part.open("ab" if start else "wb") as file:
        while True:
            try:
                block = answer.read(_BLOCK)
            except (OSError, http.client.HTTPException):
                return False
            if not block:
                break
            file.write(block)
            done += len(block)
            if progress and time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                of = "" if total is None else f" of {total / _MIB:.0f}"
                print(shown(f"{part.stem}: {done / _MIB:.0f}{of} MiB"), file=sys.stderr)
        # On the disk before it gets its final name: a crash must not leave a hole behind the name.
        file.flush()
        os.fsync(file.fileno())
    # http.client ends a body that breaks off like one that is complete.
    return total is None or done >= total
