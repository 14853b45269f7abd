"""metrics.jsonl, the history of a run: one JSON object a line, never lost, never doubled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_pl.training.writing import write_atomically


class History:
    """Rows of measurements, each with the images seen.

    Args:
        path: the file; made with the first row.
        every: what each row has, and of which type.
    """

    def __init__(self, path: Path, **every: type) -> None:
        self.path = path
        self.every = every or {"images": int}

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write rows, all or, if the process is killed, none of them."""
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def rows(self) -> list[dict[str, Any]]:
        """All rows, oldest first; a last line that a crash cut off is not one.

        Raises:
            ValueError: another line is no row, so that the file is damaged.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            row = self._row(line)
            if row is not None:
                rows.append(row)
            elif number < len(lines):  # the last one has no end where it was cut off
                raise ValueError(
                    f"{self.path}: line {number} is no row of measurements "
                    f"(got {line[:40]!r}); restore the file or remove the line"
                )
        return rows

    def _row(self, line: bytes) -> dict[str, Any] | None:
        """One row, None where the line is none."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict):
            return None
        return row if all(type(row.get(key)) is kind for key, kind in self.every.items()) else None

    def measured(self, images: int) -> bool:
        """Whether the model of so many images was measured."""
        return any(row["images"] == images and "name" in row for row in self.rows())

    def rewind(self, images: int) -> None:
        """Drop the rows after `images`: a resumed run measures them again, to the same numbers."""
        rows = self.rows()
        kept = [row for row in rows if row["images"] <= images]
        if self.path.exists():
            text = "".join(json.dumps(row) + "\n" for row in kept)
            write_atomically(self.path, lambda file: file.write(text.encode()))
