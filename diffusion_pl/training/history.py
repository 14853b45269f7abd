"""metrics.jsonl, the history of a run: one JSON object per line, none lost, none twice."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small, regular, unwritable, write_atomically

logger = logging.getLogger(__name__)

DAMAGED = ".damaged"  # suffix of the copy of a damaged file
RECORD = "run.json"  # in a run's folder: the data and code that it is trained with now

# What two rows must share to stand side by side; their name has the number and count of images.
SAME = ("name", "fingerprint", "extractor", "resize", "weights", "sigmas")

LARGEST = 100_000_000  # bytes of a file of rows
NUMBERS = ("value", "loss", "images_per_second", "seconds", "evaluations")


def is_held_out(row: Mapping[str, Any]) -> bool:
    """Whether a row is a held-out loss."""
    return "name" in row and "levels" in row


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a row is a number of sampled images."""
    return "name" in row and not is_held_out(row)


class History:
    """Rows of measurements, each with the images seen.

    Args:
        path: the file; created with the first row.
        every: keys that each row must have, with their types.
    """

    def __init__(self, path: Path, **every: type) -> None:
        self.path = path
        self.every = every or {"images": int}

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Append rows, all or none, and flush them to disk.

        Raises:
            UserError: the file cannot be written; it is unchanged.
        """
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if len(rows) > 1:  # rows that belong together are written at once
            before = regular(self.path).read_bytes() if self.path.exists() else b""
            text = self._ended(before) + lines
            write_atomically(self.path, lambda file: file.write(text))
            return
        try:
            self._append(lines)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def measure(self, images: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write an evaluation's rows, replacing earlier ones of the same images and names.

        Raises:
            UserError: the file cannot be written; it is unchanged.
        """
        names = {row["name"] for row in rows}
        kept = [
            row for row in self.rows() if row["images"] != images or row.get("name") not in names
        ]
        rows = [{"images": images, **row} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in [*kept, *rows]).encode()
        write_atomically(self.path, lambda file: file.write(text))

    def _append(self, line: bytes) -> None:
        """Append a line, or leave the file as it was."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(regular(self.path), "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":  # do not join a line that a crash cut off
                file.seek(0)
                ended = self._ended(file.read())
                size = min(size, len(ended))
                line = ended[size:] + line
                file.truncate(size)
            try:
                if file.write(line) < len(line):
                    raise OSError("the disk is full")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise

    def _ended(self, content: bytes) -> bytes:
        """The content without a truncated last line, ending in a newline."""
        end = content.rfind(b"\n") + 1
        return content[:end] if self._row(content[end:]) is None else content + b"\n"

    def mend(self) -> None:
        """Repair the file after a crash or a power cut, before a run resumes.

        A truncated last line is dropped silently, since the run measures it again. Other invalid
        lines, such as zeros after a power cut, are dropped with a warning, and a copy of the file
        is kept.

        Raises:
            UserError: the file cannot be read or written.
        """
        if not self.path.exists():
            return
        content = regular(self.path).read_bytes()
        lines = self._ended(content).split(b"\n")[:-1]
        kept = [line for line in lines if self._row(line) is not None]
        lost = sum(bool(line) for line in lines) - len(kept)
        mended = b"".join(line + b"\n" for line in kept)
        if mended == content:
            return
        if lost:
            aside = self.path.with_name(self.path.name + DAMAGED)
            write_atomically(aside, lambda file: file.write(content))
            logger.warning(
                "%s: %d lines are no rows of measurements; going on without them, the file as it "
                "was is kept as %s",
                self.path,
                lost,
                aside.name,
            )
        write_atomically(self.path, lambda file: file.write(mended))

    def rows(self) -> list[dict[str, Any]]:
        """All rows, oldest first, without a truncated last line.

        Raises:
            UserError: another line is not a row: the file is damaged.
        """
        if not self.path.exists():
            return []
        content = regular(self.path).read_bytes()
        rows = []
        for number, line in enumerate(self._ended(content).split(b"\n"), start=1):
            if not line:
                continue
            row = self._row(line)
            if row is not None:
                rows.append(row)
            else:
                raise UserError(
                    f"{self.path}: line {number} is no row of measurements "
                    f"(got {line[:40]!r}); restore the file or remove the line"
                )
        return rows

    def _row(self, line: bytes) -> dict[str, Any] | None:
        """Parse a row; None if invalid."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict):
            return None
        return row if all(type(row.get(key)) is kind for key, kind in self.every.items()) else None

    def measured(self, images: int) -> bool:
        """Whether there are metrics of the model after `images` images."""
        return any(row["images"] == images and is_evaluation(row) for row in self.rows())

    def rewind(self, images: int) -> None:
        """Drop the rows after `images`, which a resumed run repeats."""
        rows = self.rows()
        kept = [row for row in rows if row["images"] <= images]
        if self.path.exists():
            text = "".join(json.dumps(row) + "\n" for row in kept)
            write_atomically(self.path, lambda file: file.write(text.encode()))


def fit_rows(path: Path, problems: list[str], *, images: bool = True) -> list[Mapping[str, Any]]:
    """The fit rows of any file, without values of unfit types; a truncated last one is passed over.

    Args:
        path: the file; it may be absent.
        problems: a line is added on what cannot be read.
        images: each row has the images seen.
    """
    if not path.exists():
        return []
    try:
        content = read_small(path, LARGEST)
    except (ValueError, OSError) as error:
        problems.append(" ".join(str(error).split()))
        return []
    *lines, rest = content.split(b"\n")
    found = [_fit_row(line, images) for line in lines if line.strip()]
    last = _fit_row(rest, images)
    bad = sum(row is None for row in found)
    if bad:
        problems.append(f"{path}: {bad:,} of {len(found):,} lines are damaged; the others are told")
    return [row for row in (*found, last) if row is not None]


def _fit_row(line: bytes, images: bool) -> Mapping[str, Any] | None:
    """A row without values of unfit types; None where it is no row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or (images and not _is_count(row.get("images"))):
        return None
    if "name" in row and not (isinstance(row["name"], str) and _is_number(row.get("value"))):
        return None
    return {key: _fit(key, value) for key, value in row.items() if _is_fit(key, value)}


def _is_fit(key: str, value: Any) -> bool:
    if key == "blocks":
        return isinstance(value, list) and all(map(_is_number, value))
    if key == "images_per_second":
        return _is_number(value) and 0 < value < math.inf
    return key not in NUMBERS or _is_number(value)


def _fit(key: str, value: Any) -> Any:
    """What identifies a number is text."""
    return json.dumps(value) if key in SAME and not isinstance(value, (str, NoneType)) else value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 10**18


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float holds, infinite ones and nan among them."""
    return type(value) is float or (type(value) is int and abs(value) < 10**300)
