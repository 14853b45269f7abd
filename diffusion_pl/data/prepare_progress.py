"""The progress of `prepare` on stderr: a bar for a person, a line every ten seconds for a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from diffusion_pl.data.prepare import Report

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def reported() -> Iterator[Report]:
    """What `prepare` reports to."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (
        TextColumn("prepare"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None, rate="", start=False)
        began = time.monotonic()

        def report(earlier: int, done: int, total: int) -> None:
            rate = f"{done / max(time.monotonic() - began, 1e-3):,.0f} images/s"
            if not progress.tasks[0].started:
                progress.update(task, completed=earlier)
                progress.start_task(task)
            progress.update(task, total=total, completed=earlier + done, rate=rate)

        yield report


def _lines() -> Report:
    began = said = time.monotonic()

    def report(earlier: int, done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < _SECONDS_BETWEEN_LINES or not done:
            return
        said = now
        rate = done / (now - began)
        left = (total - earlier - done) / rate
        print(
            f"prepare: {earlier + done:,} of {total:,} images, {rate:,.0f} images/s, "
            f"{left:,.0f} s left",
            file=sys.stderr,
        )

    return report
