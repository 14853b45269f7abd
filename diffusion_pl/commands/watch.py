"""`watch`: follow a run from another terminal, by the files in its folder alone.

The files are looked at every few seconds, which file systems of clusters allow too.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from diffusion_pl import locks
from diffusion_pl.commands import hints
from diffusion_pl.commands.options import RunFolder
from diffusion_pl.commands.report_read import Told, setting, told
from diffusion_pl.commands.results import Result
from diffusion_pl.commands.run_list import age_of
from diffusion_pl.signals import FAILED, MARKER
from diffusion_pl.view import RunView, as_ascii

EVERY = 2.0  # seconds between two looks
SILENT = 2 * locks.DEAD_AFTER  # seconds without a sign of life, which are told
ENDED = ("finished", "failed")
PLAIN = 100  # columns where there is no terminal
FILES = ("metrics.jsonl", "evaluations.jsonl", "config.yaml", "run.json", MARKER, FAILED)


def command(run: RunFolder, /) -> Result:
    """Follow a run from another terminal: progress, losses, newest numbers.

    It reads the run's folder alone, on any machine that sees it, until the run has ended or you
    press Ctrl-C, which the run does not notice. Without a terminal it prints the state once.

    Example: diffusion_pl watch runs/mine
    """
    console = Console(soft_wrap=True)
    if console.is_terminal:
        view = Follower(run, console).follow()
        lines: Sequence[str] = ()
    else:
        view = view_of(told(run, run.resolve().name))
        lines = [line.plain.rstrip() for line in view.lines(PLAIN, 40)]
    newest = {name: values[-1][1] for name, values in view.numbers.items()}
    values = {
        "run": str(run),
        "state": view.state,
        "about": view.about,
        "images": view.images,
        "budget": view.total,
        "loss": view.curve[-1][1] if view.curve else None,
        "held_out": {kind: row.get("value") for kind, row in view.held_out.items()},
        "measures": newest,
        "problems": list(view.messages),
    }
    after = [hints.next_line("report", run)] if view.state == "finished" else []
    return Result(values, lines, after, in_pipes=True)


def view_of(run: Told, now: datetime.datetime | None = None) -> RunView:
    """The view of a run that was read.

    Args:
        run: its folder's files, as far as they could be read.
        now: in UTC; the present when not given.
    """
    every = setting(run.run.tree, "evaluation.every")
    view = RunView(run.name, run.budget, every if type(every) is int and every > 0 else 0)
    view.messages.extend(each.removeprefix(f"{run.run.folder}/") for each in run.problems)
    for row in (*run.run.rows, *run.run.evaluations):
        view.note(row)
    view.state = {"running": "training"}.get(run.state, run.state)
    waiting = run.state == "stopped" and (run.run.folder / MARKER).exists()
    told_apart = {
        "begun": "no row yet",
        "stopped": "waits to go on: the same command" if waiting else "",
    }
    age = _age(run, now or datetime.datetime.now(datetime.UTC))
    parts = [run.why, told_apart.get(run.state, ""), age]
    view.about = ", ".join(part for part in parts if part)
    return view


def _age(run: Told, now: datetime.datetime) -> str:
    """How old the newest row is; "" where none says when it was written."""
    for row in reversed(run.run.rows):
        try:
            then = datetime.datetime.fromisoformat(row["time"])
            return f"newest row {age_of(max(0.0, (now - then).total_seconds()))} ago"
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    return ""


class Follower:
    """Shows a run until it has ended.

    Args:
        run: its folder.
        console: a terminal.
    """

    def __init__(self, run: Path, console: Console) -> None:
        self.run = run
        self.console = console
        self.seen: object = None  # of the files, when they were read
        self.beat: object = None  # of the lock
        self.beat_since = time.monotonic()
        self.found = told(run, run.resolve().name)

    def follow(self) -> RunView:
        """Look and show, until the run has ended or Ctrl-C."""
        live = Live(
            console=self.console, auto_refresh=False, vertical_overflow="crop", transient=False
        )
        view = self.look()
        try:
            with live:
                self.console.show_cursor(True)  # whatever ends this process, it stays
                while True:
                    width, height = self.console.size
                    live.update(Group(*self._lines(view, width - 1, height - 2)), refresh=True)
                    if view.state in ENDED:
                        break
                    time.sleep(EVERY)
                    view = self.look()
        except KeyboardInterrupt:
            pass  # the way to leave
        return view

    def look(self) -> RunView:
        """The run as it is now; its files are read where one of them has changed."""
        seen = [_stamp(self.run / name) for name in FILES]
        holder = locks.read(self.run / locks.NAME)
        if (seen, holder) != self.seen or self.found.state == "running":
            self.seen = (seen, holder)
            self.found = told(self.run, self.run.resolve().name)
        view = view_of(self.found)
        beat = _stamp(self.run / locks.NAME)
        if beat != self.beat:
            self.beat, self.beat_since = beat, time.monotonic()
        silent = time.monotonic() - self.beat_since
        if view.state == "training" and silent > SILENT:
            view.about += f", no sign of life for {age_of(silent)}"
        return view

    def _lines(self, view: RunView, width: int, height: int) -> list[Text]:
        lines = view.lines(width, height)
        return lines if self.console.encoding.startswith("utf") else as_ascii(lines)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes with a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
