"""The best checkpoint of a run by one of its metrics: RUN/best/fid.ckpt, its value in fid.json.

Pruning leaves that folder alone.
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

# Metrics that may choose the best checkpoint, and whether higher is better.
HIGHER = dict.fromkeys(
    ("fid", "fd", "sfid", "sfd", "kid", "kd", "cmmd", "mmd"), False
) | dict.fromkeys(("is", "cs", "precision", "recall", "density", "coverage", "clip_score"), True)


class Best:
    """Tracks the best value so far and keeps its checkpoint.

    Args:
        run: the run's folder.
        number: name of the metric, such as `fid`.
        higher: whether higher is better.
    """

    def __init__(self, run: Path, number: str, *, higher: bool) -> None:
        self.number, self.higher = number, higher
        self.path = run / FOLDER / f"{number}.ckpt"
        self.note = self.path.with_suffix(".json")

    def value(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """The metric's value in the rows of an evaluation."""
        [value] = [row["value"] for row in rows if row["name"].partition("@")[0] == self.number]
        return float(value)

    def is_better(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether an evaluation is the best so far; the first is."""
        if not (self.note.exists() and self.path.exists()):
            return True
        try:
            before = float(json.loads(read_small(self.note))["value"])
        except (ValueError, KeyError, TypeError):
            return True  # the note was cut off
        value = self.value(rows)
        return value > before if self.higher else value < before

    def take(self, checkpoint: Path) -> None:
        """Keep a saved checkpoint, as a hard link or a copy."""
        with aside(self.path) as part:
            part.unlink(missing_ok=True)
            try:
                os.link(checkpoint, part)
            except OSError:  # a file system without links
                shutil.copyfile(checkpoint, part)

    def write(self, rows: Sequence[Mapping[str, Any]], images: int) -> None:
        """Write the value beside the checkpoint, once that is in place."""
        [row] = [row for row in rows if row["name"].partition("@")[0] == self.number]
        said = {"images": images, "name": row["name"], "value": row["value"]}
        write_atomically(self.note, lambda file: file.write(f"{json.dumps(said)}\n".encode()))
