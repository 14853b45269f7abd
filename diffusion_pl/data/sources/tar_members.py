"""The members of WebDataset tars by their keys: what a tar may hold, and reading it by offset.

The headers are read once. Nothing is unpacked; links, devices and paths that lead outside are
refused.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from diffusion_pl.data.files import CONTROL, LARGEST_FILE, is_leftover
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import regular

_BLOCK = 512

# Zero blocks that fill up a tar's last record; 10 KiB is usual, some writers use more.
_LARGEST_TAIL = 1024**2


class Member(NamedTuple):
    """Where the bytes of a member begin in the tar, and how many there are."""

    offset: int
    size: int


@dataclass
class Sample:
    """Members of one key, by their ending."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)


def samples_of(file: Path) -> list[Sample]:
    """The samples of one tar, its end checked; members of a key may lie apart."""
    samples: dict[str, Sample] = {}
    end = 0
    try:
        with tarfile.open(regular(file), "r:") as archive:
            while (member := archive.next()) is not None:
                # tarfile keeps every header that it has seen; a tar may have a million.
                archive.members = []  # type: ignore[attr-defined]
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK * member.isreg()
                if not _admitted(member, file):
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                members = samples.setdefault(key, Sample(key)).members
                if ending.lower() in members:
                    raise UserError(f"{file}: {member.name} is there twice")
                members[ending.lower()] = Member(member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{file}: damaged or not a .tar ({error}); fetch it again") from error
    _check_end(file, end)
    return list(samples.values())


def _admitted(member: tarfile.TarInfo, file: Path) -> bool:
    """Whether a member is a file to look at."""
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts or "\\" in member.name:
        raise UserError(f"{file}: {member.name!r} has an odd path")
    if is_leftover(member.name):
        return False
    if CONTROL.search(member.name):
        raise UserError(f"{file}: {member.name!r} has an odd path")
    if member.isdir():
        return False
    if not member.isreg() or member.issparse():
        raise UserError(f"{file}: {member.name!r} is a link, a device or no plain file")
    if member.size > LARGEST_FILE:
        raise UserError(f"{file}: {member.name} is too large for an image")
    return not any(part.startswith("__") for part in parts)


def _check_end(file: Path, end: int) -> None:
    """Check that a tar ends with zero blocks, which tarfile does not."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(end)
        tail = stream.read(_LARGEST_TAIL)
    if len(tail) < _BLOCK or any(tail[:_BLOCK]):
        raise UserError(f"{file}: ends too soon or is damaged at byte {end:,}; fetch it again")
    if any(tail) or size > end + _LARGEST_TAIL:
        raise UserError(f"{file}: goes on behind its end at byte {end:,}; unpack and pack it again")


def bytes_of(path: str, offset: int, size: int) -> bytes:
    """Bytes of a file.

    Raises:
        UserError: it cannot be read, or ends before them.
    """
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) < size:
        raise UserError(f"{path}: ends too soon; fetch it again")
    return data
