"""What a run's folder says for a report; whatever is wrong with it is noted, and the rest read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_pl import config
from diffusion_pl.commands.compare import Measured, Row, encoder_of
from diffusion_pl.commands.run_list import state_of
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small
from diffusion_pl.training.history import RECORD, fit_rows, is_held_out


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
    rows = sorted(fit_rows(folder / "metrics.jsonl", problems), key=lambda row: row["images"])
    record = _object(folder / RECORD, problems)
    evaluations = fit_rows(folder / "evaluations.jsonl", problems)
    run = Measured(name, folder, tree, rows, evaluations, encoder_of(record))
    state, why = _state(run)
    return Told(
        run,
        state,
        why,
        problems,
        record,
        fit_rows(folder / "sweep" / "rows.jsonl", problems, images=False),
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


def _grids(folder: Path) -> Iterator[tuple[int, Path]]:
    """The grids of samples by the images seen."""
    for path in folder.glob("*.png"):
        if path.stem.isascii() and path.stem.isdecimal() and len(path.stem) < 19 and path.is_file():
            yield int(path.stem), path
