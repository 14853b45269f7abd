"""Progress on stderr: a view or bars on a terminal, lines at intervals elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich import progress as bars
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress as Bar
from rich.text import Text

from diffusion_pl.names import shown
from diffusion_pl.view import LOSS_WORDS, RunView, as_ascii, clock, speed_text

__all__ = ["Progress", "bar", "clock", "counted", "format_row", "reported", "track"]

REFRESH = 0.5  # seconds between two views
LINE = 15.0  # seconds between lines where there is no terminal
PREPARE_LINE = 10.0  # the same for `prepare`

# Called with the images done by earlier runs, by this one, and the total.
Report = Callable[[int, int, int], None]

T = TypeVar("T")


def format_row(row: Mapping[str, Any]) -> str:
    """A number with its name, bias and warning."""
    words = f"{row['name']} = {row['value']:.4g}"
    if "blocks" in row:
        words += f" (mean of {len(row['blocks'])}; min {row['min']:.4g}, range {row['range']:.2g})"
    if "bias" in row:
        words += f", of which about {row['bias']:.2g} due to few images"
    if "warning" in row:
        words += f" ({row['warning']})"
    return words


class Progress:
    """Progress of training: the view of the run on a terminal, lines elsewhere; both on stderr.

    The speed is that of training alone.

    Args:
        total: images of the budget.
        console: where to write; stderr when not given.
        name: of the run.
        every: images between evaluations; 0 for none.
    """

    def __init__(
        self, total: int, console: Console | None = None, *, name: str = "training", every: int = 0
    ) -> None:
        self.total = total
        self.console = console or Console(file=sys.stderr, soft_wrap=True)
        self.view = RunView(name, total, every)
        self.begun = 0  # images at the start of this process
        self.started = 0.0
        self.stepped = False  # whether a step was made since
        self.busy = 0.0  # seconds of training since then
        self.last = 0.0  # time of the last look at the clock
        self.shown = 0.0  # time of the last refresh
        self.live: Live | None = None
        self.evaluated_since = 0.0

    def start(self, images: int) -> None:
        """Start at a number of images."""
        self.begun = self.view.images = images
        self.started = self.last = self.shown = time.monotonic()
        if self.console.is_terminal:
            self.live = Live(
                console=self.console,
                auto_refresh=False,
                transient=True,
                vertical_overflow="crop",
            )
            self.live.start()
            self.console.show_cursor(True)  # whatever ends this process, it stays
            self._refresh()

    def advance(self, images: int, loss: Any = None) -> None:
        """Update the images seen; cheap, called after every step.

        Args:
            images: seen.
            loss: of the step; read, which waits for the device, only where it is shown.
        """
        now = time.monotonic()
        self.busy += now - self.last
        self.last = now
        self.view.images = images
        first, self.stepped = not self.stepped, True
        if now - self.shown < (REFRESH if self.live else LINE) and not first:
            return
        self.shown = now
        if loss is not None and (self.live or self.view.smoothed is None):
            self.view.loss = float(loss)
        if self.live is not None:
            self._refresh()
        elif first:  # no speed yet: a first step starts and compiles much
            words = f"first step after {now - self.started:.1f} s"
            said = "" if self.view.loss is None else f"  loss {self.view.loss:.4g}"
            self._print(f"training {images:,}/{self.total:,} images{said}  {words}")
        else:
            self._print(f"training {self.text()}")

    def text(self) -> str:
        """The state as text: `12,800/60,000 images  250 images/s  loss 0.123  3:09 left`."""
        speed = self._speed()
        parts = [f"{self.view.images:,}/{self.total:,} images"]
        if speed:
            parts.append(speed_text(speed))
        loss = self.view.curve[-1][1] if self.view.curve else self.view.loss
        if loss is not None:
            parts.append(f"loss {loss:.4g}")
        if speed:
            parts.append(f"{clock(max(0, self.total - self.view.images) / speed)} left")
        return "  ".join(parts)

    def _speed(self) -> float:
        done = self.view.images - self.begun
        return done / self.busy if done and self.busy else 0.0

    def note(self, *rows: Mapping[str, Any]) -> None:
        """Take note of rows of the log: those of an earlier process, and each new one."""
        for row in rows:
            self.view.note(row)

    def say(self, line: str) -> None:
        """Print a line above the view."""
        self.console.print(shown(line), highlight=False, markup=False)

    def evaluating(self, done: int, total: int) -> None:
        """Update the progress of an evaluation."""
        now = time.monotonic()
        if self.view.evaluation is None:
            self.evaluated_since = now
        first = self.view.evaluation is None or self.view.evaluation[0] == 0
        self.view.evaluation = (done, total, now - self.evaluated_since)
        if self.live is not None and (first or now - self.shown >= REFRESH):
            self._refresh()
        self.last = now

    def measured(self, images: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print the numbers of an evaluation."""
        self.view.evaluation = None
        self.note(*({"images": images, **row} for row in rows))
        for row in rows:
            self.say(f"{images:,} images: {format_row(row)}")
        self.last = time.monotonic()

    def held_out(self, images: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take note of held-out losses; print them where there is no view."""
        self.note(*({"images": images, **row} for row in rows))
        if self.live is None:
            values = [f"{row['value']:.4g} ({LOSS_WORDS[row['weights']]})" for row in rows]
            self.say(f"{images:,} images: {rows[0]['name']} = {', '.join(values)}")
        self.last = time.monotonic()

    def stop(self) -> None:
        """Remove the view and leave a line in its place; safe to call twice."""
        if self.live is not None:
            live, self.live = self.live, None
            live.stop()
            self._print(f"training {self.text()}")

    def lines(self) -> list[Text]:
        """The view, of the terminal's size."""
        width, height = self.console.size
        self.view.speed = self._speed() or None
        self.view.about = clock(time.monotonic() - self.started)
        lines = self.view.lines(width - 1, height - 2)
        return lines if self.console.encoding.startswith("utf") else as_ascii(lines)

    def _refresh(self) -> None:
        assert self.live is not None
        self.shown = time.monotonic()
        self.live.update(Group(*self.lines()), refresh=True)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)


def _columns() -> tuple[bars.ProgressColumn, ...]:
    """Description, bar and text."""
    text = bars.TextColumn("{task.fields[text]}", markup=False)
    return bars.TextColumn("{task.description}", markup=False), bars.BarColumn(), text


def track(pieces: Sequence[T], what: str) -> Iterable[T]:
    """Iterate with a transient bar."""
    return bars.track(pieces, what, console=Console(stderr=True), transient=True)


@contextmanager
def bar(what: str, total: Callable[[], int]) -> Iterator[Callable[[int], None] | None]:
    """A transient bar on a terminal.

    Args:
        what: description.
        total: computes the number of steps; called only on a terminal.

    Yields:
        A function that advances the bar by a number of steps; None without a terminal.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Bar(console=console, transient=True) as shown_bar:
        task = shown_bar.add_task(what, total=total())
        yield lambda steps: shown_bar.advance(task, steps)


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A transient bar of images on a terminal.

    Yields:
        A function of the images done and their total.
    """
    console = Console(stderr=True)
    # A tile may take minutes, so the speed is averaged over a long time.
    shown_bar = Bar(
        *_columns(),
        bars.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=3600,
    )
    with shown_bar:
        task = shown_bar.add_task(shown(what), total=None, text="")

        def progress(done: int, total: int) -> None:
            shown_bar.update(task, total=total, completed=done, text=f"{done:,}/{total:,} images")

        yield progress


@contextmanager
def reported(what: str = "images") -> Iterator[Report]:
    """The progress of `prepare`: a bar on a terminal, lines elsewhere.

    Args:
        what: is counted.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lines("prepare", what)
        return
    columns = (
        bars.TextColumn("prepare"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("left"),
    )
    with Bar(*columns, console=console) as progress:
        task = progress.add_task("", total=None, rate="", start=False)
        began = time.monotonic()

        def report(earlier: int, done: int, total: int) -> None:
            rate = f"{done / max(time.monotonic() - began, 1e-3):,.0f} {what}/s"
            if not progress.tasks[0].started:
                progress.update(task, completed=earlier)
                progress.start_task(task)
            progress.update(task, total=total, completed=earlier + done, rate=rate)

        yield report


def lines(command: str, what: str = "images", every: float = PREPARE_LINE) -> Report:
    """Progress as lines on stderr, for where there is no terminal.

    Args:
        command: whose lines they are.
        what: is counted.
        every: seconds between two lines.
    """
    began = said = time.monotonic()

    def report(earlier: int, done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < every or not done:
            return
        said = now
        rate = done / (now - began)
        left = (total - earlier - done) / rate
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        print(
            f"{shown(command)}: {earlier + done:,} of {total:,} {shown(what)}, {shown(speed)} "
            f"{shown(what)}/s, {shown(clock(left))} left",
            file=sys.stderr,
            flush=True,
        )

    return report
