"""`report`: what runs are, how they fare and what they sample, as one HTML file.

The file asks nothing of a network: images, style and script are in it, and a policy forbids more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_pl.commands import hints, report_images, report_numbers, report_settings
from diffusion_pl.commands.compare import names_of
from diffusion_pl.commands.options import (
    Annotated,
    Integer,
    Parameter,
    RunFolder,
    RunOptions,
    SamplerOptions,
)
from diffusion_pl.commands.report_read import Told, told
from diffusion_pl.commands.results import Result, line
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import write_atomically
from diffusion_pl.page.html import Html, Part, document, paragraph, section, tag
from diffusion_pl.training.history import is_evaluation

if TYPE_CHECKING:  # imports torch
    from diffusion_pl.commands.report_drawn import Drawn


def command(
    run: RunFolder,
    /,
    *more: Path,
    draw: Annotated[bool, Parameter(negative="--no-draw")] = True,
    count: Integer = 40,
    out: Path | None = None,
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Write a report of runs: one HTML file without outside parts.

    Samples are drawn from each run for its classes, a film of denoising and the nearest training
    images; --no-draw tells what the runs' folders say alone, in seconds.

    Example: diffusion_pl report runs/mine

    Args:
        more: further runs, side by side with the first.
        draw: sample from the runs.
        count: images to sample from each.
        out: the file; RUN/report.html when not given, of several runs RUN/compared.html.
    """
    if count < 1:
        raise UserError(f"--count must be positive (got {count})")
    folders = [run, *more]
    runs = [told(each, name) for each, name in zip(folders, names_of(folders), strict=True)]
    made = [_drawn(each, count, sampling, options) for each in runs] if draw else None
    path = out or run / ("compared.html" if more else "report.html")
    content = page(runs, made).encode()
    write_atomically(path, lambda file: file.write(content))
    lines = [line("report", f"{path}  ({len(content) / 1e6:.1f} MB; open it in a browser)")]
    problems = [text for each in runs for text in each.problems]
    lines += [line("note", text) for text in problems]
    values = {
        "report": str(path),
        "runs": list(map(str, folders)),
        "bytes": len(content),
        "problems": problems,
    }
    return Result(values, lines, [_next(runs)])


def page(runs: Sequence[Told], made: Sequence[Drawn] | None) -> str:
    """The whole page.

    Args:
        runs: as read.
        made: what was sampled from each; None: nothing is said of samples.
    """
    levels = [None for _ in runs] if made is None else [each.levels for each in made]
    sections = [
        report_settings.what_was_run(runs),
        report_numbers.questions(runs),
        report_numbers.numbers(runs),
        report_numbers.curves(runs),
        report_numbers.levels(runs, levels),
        report_numbers.sweep(runs),
        report_images.grids(runs),
        *([] if made is None else _samples(runs, made)),
        report_settings.cost(runs),
        report_settings.environment(runs),
    ]
    title = ", ".join(each.name for each in runs)
    problems = [paragraph(text, kind="problem") for each in runs for text in each.problems]
    links = [tag("a", each.title, href=f"#{each.name}") for each in sections]
    return document(
        f"{title}: report",
        tag("h1", title),
        *map(_lead, runs),
        *problems,
        tag("nav", *links),
        *map(section, sections),
    )


def _drawn(run: Told, count: int, sampling: SamplerOptions, options: RunOptions) -> Drawn:
    from diffusion_pl.commands.report_drawn import drawn  # torch and the run's network

    return drawn(run.run.folder, count, sampling, options, levels=not (run.losses or run.held_out))


def _samples(runs: Sequence[Told], made: Sequence[Drawn]) -> list[Part]:
    from diffusion_pl.commands import report_samples

    return [
        report_samples.samples(runs, made),
        report_samples.film(runs, made),
        report_samples.neighbours(runs, made),
    ]


def _lead(run: Told) -> Html:
    seen = f"{run.run.images:,} of {run.budget:,} images" if run.budget else f"{run.run.images:,}"
    why = f": {run.why}" if run.why else ""
    return paragraph(f"{run.name}: {run.state}{why}, {seen} seen", kind="note")


def _next(runs: Sequence[Told]) -> str:
    """What to type next: measure what is not measured, compare several runs, sample one."""
    for each in runs:
        if not any(map(is_evaluation, each.all_rows)):
            return hints.next_line("evaluate", each.run.folder)
    word = "compare" if len(runs) > 1 else "sample"
    return hints.next_line(word, *(each.run.folder for each in runs))
