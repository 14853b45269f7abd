"""The best checkpoint of a run by a number that it measures, beside those that come and go.

It lies in RUN/best, which pruning does not look into: RUN/best/fid.ckpt, and fid.json with its
number. The same file is found by any command that takes a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_pl.io.files import aside, read_small, write_atomically

FOLDER = "best"


class Best:
    """Knows the best number so far, and takes in a better checkpoint.

    Args:
        run: the run's folder.
        number: its name, such as `fid`.
        higher: whether more of it is better.
    """

    def __init__(self, run: Path, number: str, *, higher: bool) -> None:
        self.number, self.higher = number, higher
        self.path = run / FOLDER / f"{number}.ckpt"
        self.note = self.path.with_suffix(".json")

    def value(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """The number among the rows of an evaluation."""
        [value] = [row["value"] for row in rows if row["name"].partition("@")[0] == self.number]
        return float(value)

    def is_better(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether an evaluation is better than all before; the first is."""
        if not (self.note.exists() and self.path.exists()):
            return True
        try:
            before = float(json.loads(read_small(self.note))["value"])
        except (ValueError, KeyError, TypeError):
            return True  # of a note that was cut off the checkpoint says nothing
        value = self.value(rows)
        return value > before if self.higher else value < before

    def take(self, checkpoint: Path) -> None:
        """Keep a checkpoint that was saved already: the same file under another name, or a copy."""
        with aside(self.path) as part:
            part.unlink(missing_ok=True)
            try:
                os.link(checkpoint, part)
            except OSError:  # a file system without links
                shutil.copyfile(checkpoint, part)

    def write(self, rows: Sequence[Mapping[str, Any]], images: int) -> None:
        """Say which one it is, after it is there."""
        [row] = [row for row in rows if row["name"].partition("@")[0] == self.number]
        said = {"images": images, "name": row["name"], "value": row["value"]}
        write_atomically(self.note, lambda file: file.write(f"{json.dumps(said)}\n".encode()))
