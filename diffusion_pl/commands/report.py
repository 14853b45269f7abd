"""`report`: what runs are, how they fare and what they sample, as one HTML file.

The file asks nothing of a network: images, style and script are in it, and a policy forbids more.
"""

from __future__ import annotations

from pathlib import Path

from diffusion_pl.commands import hints, report_images, report_numbers, report_settings
from diffusion_pl.commands.compare import names_of
from diffusion_pl.commands.options import RunFolder
from diffusion_pl.commands.report_read import Told, told
from diffusion_pl.commands.results import Result, line
from diffusion_pl.io.files import write_atomically
from diffusion_pl.page.html import Html, document, paragraph, tag


def command(run: RunFolder, /, *more: Path, out: Path | None = None) -> Result:
    """Write a report of runs: one HTML file without outside parts.

    Example: diffusion_pl report runs/mine

    Args:
        more: further runs, side by side with the first.
        out: the file; RUN/report.html when not given, of several runs RUN/compared.html.
    """
    folders = [run, *more]
    runs = [told(each, name) for each, name in zip(folders, names_of(folders), strict=True)]
    path = out or run / ("compared.html" if more else "report.html")
    content = page(runs).encode()
    write_atomically(path, lambda file: file.write(content))
    measured = all(each.all_rows for each in runs)
    lines = [line("report", f"{path}  ({len(content) / 1e6:.1f} MB; open it in a browser)")]
    lines += [line("note", text) for each in runs for text in each.problems]
    unmeasured = next((each for each in runs if not each.all_rows), None)
    after = (
        hints.next_line("evaluate", unmeasured.run.folder)
        if unmeasured is not None
        else hints.next_line("compare", *folders)
        if measured and more
        else hints.next_line("sample", run)
    )
    values = {"report": str(path), "runs": list(map(str, folders)), "bytes": len(content)}
    values["problems"] = [text for each in runs for text in each.problems]
    return Result(values, lines, [after])


def page(runs: list[Told]) -> str:
    """The whole page."""
    sections = [
        report_settings.what_was_run(runs),
        report_numbers.questions(runs),
        report_numbers.numbers(runs),
        report_numbers.curves(runs),
        report_numbers.levels(runs, [None for _ in runs]),
        report_numbers.sweep(runs),
        report_images.grids(runs),
        report_settings.cost(runs),
        report_settings.environment(runs),
    ]
    title = ", ".join(each.name for each in runs)
    problems = [paragraph(text, kind="problem") for each in runs for text in each.problems]
    return document(f"{title}: report", tag("h1", title), *map(_lead, runs), *problems, *sections)


def _lead(run: Told) -> Html:
    seen = f"{run.run.images:,} of {run.budget:,} images" if run.budget else f"{run.run.images:,}"
    why = f": {run.why}" if run.why else ""
    return paragraph(f"{run.name}: {run.state}{why}, {seen} seen", kind="note")
