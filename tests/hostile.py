"""What the corpus of hostile files shares: how a case is noted, and a program that would show."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# What makes the files of a case in an empty folder and gives what to do with them (the words of a
# command, or a function), and the words that must stand in the complaint.
CASES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {}


def case(*says: str):
    """Note a case under its function's name."""

    def noted(make):
        name = make.__name__.replace("_", " ")
        assert name not in CASES
        CASES[name] = (make, says)
        return make

    return noted


class Runs:
    """Writes the file `ran` when it is unpickled freely."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def announce(path: Path, size: int) -> None:
    """Make the last entry of a zip archive announce another size when unpacked."""
    at = path.read_bytes().rindex(b"PK\x01\x02") + 24
    changed(path, lambda data: data.__setitem__(slice(at, at + 4), size.to_bytes(4, "little")))


def changed(path: Path, change: Callable[[bytearray], object]) -> None:
    """Change a file's bytes in place."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
