"""Progress on stderr: bars on a terminal, lines at intervals elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich import progress as bars
from rich.console import Console
from rich.progress import Progress as Bar

from diffusion_pl.names import shown

REFRESH = 0.25  # seconds between movements of the bar
LINE = 15.0  # seconds between lines where there is no terminal
PREPARE_LINE = 10.0  # the same for `prepare`

# Called with the images done by earlier runs, by this one, and the total.
Report = Callable[[int, int, int], None]

T = TypeVar("T")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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
    """Progress of training: a bar on a terminal, lines elsewhere; both on stderr.

    The speed is that of training alone; an evaluation has its own bar.

    Args:
        total: images of the budget.
        console: where to write; stderr when not given.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        self.total = total
        self.console = console or Console(file=sys.stderr, soft_wrap=True)
        self.loss: float | None = None
        self.images = 0
        self.begun = 0  # images at the start of this process
        self.busy = 0.0  # seconds of training since then
        self.last = 0.0  # time of the last look at the clock
        self.shown = 0.0  # time of the last refresh
        self.bar: Bar | None = None
        self.task: Any = None
        self.evaluation: Any = None
        self.evaluated_since = 0.0

    def start(self, images: int) -> None:
        """Start at a number of images."""
        self.begun = self.images = images
        self.last = self.shown = time.monotonic()
        if self.console.is_terminal:
            self.bar = Bar(*_columns(), console=self.console, auto_refresh=False)
            self.bar.start()
            begins = "first step ..."
            self.task = self.bar.add_task("training", total=self.total, text=begins)
            self.bar.update(self.task, completed=images, refresh=True)

    def advance(self, images: int) -> None:
        """Update the images seen; cheap, called after every step."""
        now = time.monotonic()
        self.busy += now - self.last
        self.last = now
        self.images = images
        if now - self.shown < (REFRESH if self.bar else LINE):
            return
        self.shown = now
        if self.bar is None:
            self.console.print(f"training {self.text()}", highlight=False, markup=False)
        else:
            self.bar.update(self.task, completed=images, text=self.text(), refresh=True)

    def text(self) -> str:
        """The state as text: `12,800/60,000 images  250 images/s  loss 0.123  3:09 left`."""
        done = self.images - self.begun
        speed = done / self.busy if done and self.busy else 0.0
        parts = [f"{self.images:,}/{self.total:,} images"]
        if speed:
            parts.append(f"{speed:,.1f} images/s" if speed < 100 else f"{speed:,.0f} images/s")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4g}")
        if speed:
            parts.append(f"{clock(max(0, self.total - self.images) / speed)} left")
        return "  ".join(parts)

    def measure(self, loss: float) -> None:
        """Update the loss."""
        self.loss = loss

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(shown(line), highlight=False, markup=False)

    def evaluating(self, done: int, total: int) -> None:
        """Update the progress of an evaluation."""
        if self.bar is not None:
            if self.evaluation is None:
                self.evaluation = self.bar.add_task("evaluation", total=total, text="")
                self.evaluated_since = time.monotonic()
            text = f"{done:,}/{total:,} images measured"
            if done:
                left = (time.monotonic() - self.evaluated_since) * (total - done) / done
                text += f"  {clock(left)} left"
            self.bar.update(self.evaluation, completed=done, text=text, refresh=True)
        self.last = time.monotonic()

    def measured(self, images: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print the numbers of an evaluation and remove its bar."""
        if self.bar is not None and self.evaluation is not None:
            self.bar.remove_task(self.evaluation)
            self.evaluation = None
        for row in rows:
            self.say(f"{images:,} images: {format_row(row)}")
        self.last = time.monotonic()

    def held_out(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take note of held-out losses."""
        self.last = time.monotonic()

    def stop(self) -> None:
        """Remove the bar; safe to call twice."""
        if self.bar is not None:
            self.bar.update(self.task, completed=self.images, text=self.text(), refresh=True)
            self.bar.stop()
            self.bar = None


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
        yield _lines(what)
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


def _lines(what: str) -> Report:
    began = said = time.monotonic()

    def report(earlier: int, done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < PREPARE_LINE or not done:
            return
        said = now
        rate = done / (now - began)
        left = (total - earlier - done) / rate
        print(
            f"prepare: {earlier + done:,} of {total:,} {shown(what)}, {rate:,.0f} "
            f"{shown(what)}/s, "
            f"{left:,.0f} s left",
            file=sys.stderr,
        )

    return report
