"""Processes of this machine, and which of the files that are being written are theirs."""

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

LEFT_AFTER = 3600.0  # seconds without a write, after which another machine's file is a leftover

# How the file of a writer ends while it is written: the machine, the process, when that began.
_TEMPORARY = re.compile(r"\.(?P<place>[0-9a-f]{8})-(?P<process>[0-9]+)-(?P<began>[0-9]+)\.tmp$")
_EARLIER = re.compile(r"\.(?P<process>[0-9]+)\.tmp$")  # before these names told the machine


def is_running(process: int, began: int) -> bool:
    """Whether a process of this machine runs: that one, and not a later one of its number.

    Args:
        process: its number.
        began: when it began, 0 if not known.
    """
    since = began_at(process)
    if since is not None:
        return began in (0, since)
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # ended, or no number of a process
        return False
    except PermissionError:  # another user's, which /proc may hide
        return True
    return not sys.platform.startswith("linux")  # or it has ended, and nobody has asked how


def began_at(process: int) -> int | None:
    """When a process began, in ticks since the machine did; None: it has ended, or not Linux."""
    try:
        # Behind its name in brackets, which may hold anything: proc(5).
        words = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else int(words[19])  # ended, but not yet asked how


@functools.cache
def place() -> str:
    """The running system and the space of its process numbers, which no other machine shares."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode()}"


def temporary(path: Path) -> Path:
    """Where this process writes a file before it takes its place; known to be its own."""
    process = os.getpid()
    return path.with_name(f".{path.name}.{_short()}-{process}-{began_at(process) or 0}.tmp")


def _short() -> str:
    """This machine in eight letters."""
    return f"{zlib.crc32(place().encode()):08x}"


def is_leftover(path: Path) -> bool:
    """Whether such a file belongs to a process that has ended; others' files never do.

    One of another machine is left over when it was not written to for `LEFT_AFTER` seconds.
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
