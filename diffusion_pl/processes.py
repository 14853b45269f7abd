"""Processes of this machine, and the temporary files that belong to them."""

from __future__ import annotations

import functools
import os
import re
import socket
import sys
import time
import uuid
import zlib
from pathlib import Path

LEFT_AFTER = 3600.0  # seconds without a write after which another machine's file is a leftover

# Ending of a temporary file: machine, process id, start time of the process.
_TEMPORARY = re.compile(r"\.(?P<place>[0-9a-f]{8})-(?P<process>[0-9]+)-(?P<began>[0-9]+)\.tmp$")
_EARLIER = re.compile(r"\.(?P<process>[0-9]+)\.tmp$")  # of earlier versions


def is_running(process: int, began: int) -> bool:
    """Whether a process of this machine runs, and is not a later one of the same number.

    Args:
        process: id.
        began: start time, as of `began_at`; 0 if not known.
    """
    since = began_at(process)
    if since is not None:
        return began in (0, since)
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # ended, or not a process id
        return False
    except PermissionError:  # another user's, which /proc may hide
        return True
    return not sys.platform.startswith("linux")  # or it is a zombie


def began_at(process: int) -> int | None:
    """Start time of a process in ticks since boot; None: it has ended, or not Linux."""
    try:
        # Behind its name in brackets, which may hold anything: proc(5).
        words = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else int(words[19])  # zombie or dead


@functools.cache
def place() -> str:
    """The boot and the namespace of process ids, unique to a machine and container."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode()}"


def temporary(path: Path) -> Path:
    """The path at which this process writes a file before renaming it."""
    process = os.getpid()
    return path.with_name(f".{path.name}.{_short()}-{process}-{began_at(process) or 0}.tmp")


def _short() -> str:
    """`place` as eight hex digits."""
    return f"{zlib.crc32(place().encode()):08x}"


def is_leftover(path: Path) -> bool:
    """Whether a file is temporary and its process has ended.

    One of another machine counts as left over when it was not written to for LEFT_AFTER seconds.
    """
    if found := _TEMPORARY.search(path.name):
        if found["place"] == _short():
            return not is_running(int(found["process"]), int(found["began"]))
    elif not _EARLIER.search(path.name):
        return False
    try:
        return time.time() - path.lstat().st_mtime > LEFT_AFTER
    except OSError:
        return False
