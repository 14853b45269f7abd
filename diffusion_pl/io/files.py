"""Files: atomic writing, digests, bounded reading, locking; links and pipes are refused."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from diffusion_pl import processes
from diffusion_pl.errors import UserError

# Errors of the disk or of limits of the process, not bugs of the program.
_OF_THE_MACHINE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE}
)

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file whole or not at all, as `aside` does.

    Args:
        path: the file to make or replace; its folder is made.
        write: called with the open binary file.

    Raises:
        UserError: the folder cannot be written or is full; the target is as before.
    """
    with aside(path) as temporary, open(temporary, "wb", opener=_no_link) as file:
        write(file)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Write beside the target, flush to the disk, then rename: the target is whole or as before.

    Args:
        path: the file to make or replace; its folder is made.

    Yields:
        The temporary path to write to.

    Raises:
        UserError: the folder cannot be written or is full; the target is as before.
    """
    temporary = processes.temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove temporary files below a folder whose writers were killed; others stay."""
    for path in folder.rglob(".*.tmp"):
        if processes.is_leftover(path):
            path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The digest (hex) of a file of any size.

    Raises:
        UserError: not a regular file.
        OSError: absent or unreadable.
    """
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unwritable(path: Path, error: Exception) -> ValueError:
    """The error for a file that could not be written."""
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    return UserError(
        f"{path}: cannot be written ({reason}); free space or permissions, then run again"
    )


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a network's or a FUSE folder
            raise
    finally:
        os.close(descriptor)


def regular(path: Path) -> Path:
    """Return a path that may be opened: opening a pipe may block, and a device may be endless.

    Raises:
        UserError: a folder, pipe, socket or device is there; an absent file passes.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # a name with a null byte
        return path
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
        raise UserError(f"{path}: is {kind}, not a file; name a regular file")
    return path


def last_change(path: Path) -> int:
    """When a file was last written or replaced, ns; 0 where it is gone."""
    try:
        state = path.stat()
    except OSError:
        return 0
    return max(state.st_mtime_ns, state.st_ctime_ns)


def nearest(path: Path) -> Path | None:
    """A path in the same folder with a similar name; None where the path itself exists."""
    if path.exists():
        return None
    try:
        names = [each.name for each in path.parent.iterdir() if not each.name.startswith(".")]
    except OSError:
        return None
    found = difflib.get_close_matches(path.name, names, 1)
    return path.parent / found[0] if found else None


def read_small(path: Path, most: int = 1_000_000) -> bytes:
    """Read a small file, of at most `most` bytes.

    Raises:
        UserError: not a regular file, or larger.
        OSError: absent or unreadable.
    """
    with regular(path).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path}: is larger than {most:,} bytes; restore or remove it")
    return content


def read_named(path: Path) -> bytes:
    """The content of a file that the user names.

    Raises:
        UserError: it cannot be read, or is no regular file.
    """
    try:
        return regular(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def open_lock(path: Path) -> int:
    """Open a lock file, made if absent; the caller closes the descriptor.

    Raises:
        UserError: a link, or not a regular file.
        OSError: the folder cannot be written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_lock(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_lock(path)
    return descriptor


def _no_lock(path: Path) -> ValueError:
    return UserError(f"{path}: is a link or not a regular file, which cannot be locked; remove it")


def _no_link(path: str, flags: int) -> int:
    """An opener that does not write through a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def machine_problem(error: OSError) -> str | None:
    """The error line for a failure of the disk or of permissions; None for any other error."""
    if error.filename is None and error.errno not in _OF_THE_MACHINE:
        return None
    where = os.fspath(error.filename) if error.filename is not None else "a file"
    if isinstance(where, bytes):
        where = os.fsdecode(where)
    return (
        f"{where}: cannot be read or written ({error.strerror}); free space or permissions, then "
        "run again"
    )
