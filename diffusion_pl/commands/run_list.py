"""`runs`: every run below a folder, how far it is and how it fares."""

from __future__ import annotations

import datetime
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_pl import locks
from diffusion_pl.commands.compare import Measured, read, table
from diffusion_pl.commands.results import Result
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small
from diffusion_pl.signals import FAILED, MARKER
from diffusion_pl.training.history import is_evaluation

DEEPEST = 4  # folders below the named one
SHORTEST = 12  # characters of a name


@dataclass(frozen=True)
class Listed:
    """A run in the list.

    Args:
        run: its folder, below the one that was named.
        state: running, finished, stopped, failed, begun or unreadable.
        why: of a failed or unreadable run; where a running one runs.
        images: seen so far.
        budget: images that it is to see; 0 where that is not known.
        metric: its newest number, as "fd@500 5.21", "" for none.
        seconds: since its newest row was written, nan where there is none.
    """

    run: str
    state: str
    why: str = ""
    images: int = 0
    budget: int = 0
    metric: str = ""
    seconds: float = math.nan

    def cells(self) -> list[str]:
        """Its row of the table."""
        share = f"{min(100 * self.images // self.budget, 100)} %" if self.budget else ""
        age = "" if math.isnan(self.seconds) else age_of(self.seconds)
        return [self.run, self.state, share, f"{self.images:,}", self.metric, age]


def command(folder: Path = Path("runs"), /) -> Result:
    """List the runs below a folder: state, progress, newest number, age.

    Example: diffusion_pl runs

    Args:
        folder: below which runs are looked for.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; runs lie under runs/")
    found = [listed(each, folder) for each in sorted(below(folder))]
    head = ["run", "state", "", "images", "newest number", "age"]
    rows = [each.cells() for each in found]
    if sys.stdout.isatty():
        rows = fitted(head, rows, shutil.get_terminal_size().columns)
    lines = table(head, rows, left=(0, 1, 4))
    lines += [f"{each.run}: {each.why}" for each in found if each.why]
    values: dict[str, Any] = {
        each.run: {
            key: value
            for key, value in vars(each).items()
            if key != "run" and value == value  # not nan
        }
        for each in found
    }
    return Result(values, lines if found else [f"{folder}: no run yet"], in_pipes=True)


def fitted(head: Sequence[str], rows: Sequence[list[str]], width: int) -> list[list[str]]:
    """Rows of a table whose names are cut so that it fits, where they are not all too long.

    Args:
        head: of the table.
        rows: each with the name first.
        width: columns of the terminal.
    """
    whole = [head, *rows]
    others = sum(max(len(row[place]) for row in whole) + 2 for place in range(1, len(head)))
    room = max(width - others, SHORTEST)
    return [[cut(row[0], room), *row[1:]] for row in rows]


def cut(name: str, length: int) -> str:
    """A name with its middle left out, where it is longer; runs of a sweep differ at the end."""
    if len(name) <= length:
        return name
    last = (length - 1) * 2 // 3
    return f"{name[: length - 1 - last]}…{name[len(name) - last :]}"


def below(folder: Path) -> Iterator[Path]:
    """The folders of runs, which have a config and checkpoints or rows; links are not followed."""
    for top, folders, files in os.walk(folder):
        if "config.yaml" in files and ("checkpoints" in folders or "metrics.jsonl" in files):
            folders.clear()
            yield Path(top)
        elif len(Path(top).relative_to(folder).parts) >= DEEPEST:
            folders.clear()


def listed(run: Path, folder: Path) -> Listed:
    """What a run's files say; whatever is wrong with them is told, since the others stand."""
    name = str(run.relative_to(folder)) if run != folder else str(run)
    try:
        measured = read(run, name)
        state, why = state_of(measured)
        return Listed(
            name, state, why, measured.images, measured.budget, _newest(measured), _age(measured)
        )
    except (UserError, KeyError, TypeError, AttributeError) as error:
        return Listed(name, "unreadable", " ".join(str(error).split()))


def state_of(run: Measured) -> tuple[str, str]:
    """Whether a run goes on, has ended or why it has not; and what there is to say of it."""
    holder = locks.live_holder(run.folder / locks.NAME)
    if holder is not None:
        return "running", f"{holder}"
    failed = run.folder / FAILED
    if failed.is_file():
        return "failed", read_small(failed).decode(errors="replace").strip().partition("\n")[0]
    if run.images >= run.budget:
        return "finished", ""
    marked = (run.folder / MARKER).exists() or run.images
    return ("stopped" if marked else "begun"), ""


def age_of(seconds: float) -> str:
    """A time span in its largest unit: 40 s, 5 min, 3 h, 12 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def _newest(run: Measured) -> str:
    """The first number of the newest evaluation."""
    rows = [row for row in run.rows if is_evaluation(row)]
    first = next((row for row in rows if row["images"] == rows[-1]["images"]), None)
    return "" if first is None else f"{first['name'].partition('/')[0]} {first['value']:.4g}"


def _age(run: Measured) -> float:
    """Seconds since the newest row."""
    times = [row["time"] for row in run.rows if "time" in row]
    if not times:
        return math.nan
    now = datetime.datetime.now(datetime.UTC)
    return max(0.0, (now - datetime.datetime.fromisoformat(times[-1])).total_seconds())
