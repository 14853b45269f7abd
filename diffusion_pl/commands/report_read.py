"""What a run's folder says for a report; whatever is wrong with it is noted, and the rest read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from diffusion_pl import config
from diffusion_pl.commands.compare import SAME, Measured, Row
from diffusion_pl.commands.run_list import state_of
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small
from diffusion_pl.training.history import is_held_out

LARGEST = 100_000_000  # bytes of a file of rows
NUMBERS = ("value", "loss", "images_per_second", "seconds", "evaluations")


@dataclass(frozen=True)
class Told:
    """A run as a report tells it.

    Args:
        run: its settings and rows, those that are fit.
        state: running, finished, stopped, failed, begun or unreadable.
        why: of a failure.
        problems: what could not be read, a line each.
        record: run.json.
        sweep: rows of RUN/sweep.
        losses: of RUN/losses, as the command `losses` gives them.
        grids: images seen to the file of samples, in order.
    """

    run: Measured
    state: str
    why: str
    problems: Sequence[str]
    record: Mapping[str, Any]
    sweep: Sequence[Row]
    losses: Mapping[str, Any]
    grids: Sequence[tuple[int, Path]]

    @property
    def name(self) -> str:
        """The run's."""
        return self.run.name

    @property
    def budget(self) -> int:
        """Images it is to see; 0 where that is not known."""
        wanted = setting(self.run.tree, "trainer.total_images")
        return wanted if type(wanted) is int else 0

    @property
    def all_rows(self) -> list[Row]:
        """Every number that was measured, those of training first; held-out losses among them."""
        return [row for row in (*self.run.rows, *self.run.evaluations) if "name" in row]

    @property
    def held_out(self) -> dict[str, list[Row]]:
        """The held-out losses by the kind of weights, as they were measured."""
        found: dict[str, list[Row]] = {}
        for row in self.run.rows:
            if is_held_out(row):
                found.setdefault(str(row.get("weights")), []).append(row)
        return found


def told(folder: Path, name: str) -> Told:
    """Read a run's folder, as far as it can be read.

    Raises:
        UserError: there is no run.
    """
    if not any((folder / file).is_file() for file in ("config.yaml", "metrics.jsonl")):
        raise UserError(f"{folder}: there is no run here (no config.yaml)")
    problems: list[str] = []
    tree = _read(problems, lambda: dict(config.load(folder / "config.yaml").tree), {})
    rows = sorted(_rows(folder / "metrics.jsonl", problems), key=lambda row: row["images"])
    run = Measured(name, folder, tree, rows, _rows(folder / "evaluations.jsonl", problems))
    state, why = _state(run)
    return Told(
        run,
        state,
        why,
        problems,
        _object(folder / "run.json", problems),
        _rows(folder / "sweep" / "rows.jsonl", problems, images=False),
        _object(folder / "losses" / "losses.json", problems),
        sorted(_grids(folder / "samples")),
    )


def setting(tree: Mapping[str, Any], key: str) -> Any:
    """A setting by its dotted key; None where there is none."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _read(problems: list[str], read: Callable[[], Any], otherwise: Any) -> Any:
    """What is read, or a problem and something else."""
    try:
        return read()
    except (ValueError, OSError, RecursionError) as error:
        problems.append(" ".join(str(error).split()))
        return otherwise


def _state(run: Measured) -> tuple[str, str]:
    try:
        return state_of(run)
    except (UserError, KeyError, TypeError):
        return "unreadable", "its settings cannot be read"


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; {} where there is no file."""
    if not path.exists():
        return {}
    found = _read(problems, lambda: json.loads(read_small(path)), {})
    if not isinstance(found, dict):
        problems.append(f"{path}: is no JSON object")
        return {}
    return found


def _rows(path: Path, problems: list[str], *, images: bool = True) -> list[Row]:
    """The rows of a file; lines that are none are counted, a truncated last one is passed over."""
    if not path.exists():
        return []
    content: bytes = _read(problems, lambda: read_small(path, LARGEST), b"")
    *lines, rest = content.split(b"\n")
    found = [_row(line, images) for line in lines if line.strip()]
    last = _row(rest, images)
    bad = sum(row is None for row in found)
    if bad:
        problems.append(f"{path}: {bad:,} of {len(found):,} lines are damaged; the others are told")
    return [row for row in (*found, last) if row is not None]


def _row(line: bytes, images: bool) -> Row | None:
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


def _grids(folder: Path) -> Iterator[tuple[int, Path]]:
    """The grids of samples by the images seen."""
    for path in folder.glob("*.png"):
        if path.stem.isascii() and path.stem.isdecimal() and len(path.stem) < 19 and path.is_file():
            yield int(path.stem), path
