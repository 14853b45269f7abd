"""The parts of a report that tell how a run fares: its numbers with their provenance, and curves.

Only numbers of one name, one data set, one extractor and one kind of weights share an axis.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusion_pl.commands import hints
from diffusion_pl.commands.compare import DRAWN, Row, key_of
from diffusion_pl.commands.report_read import Told, setting
from diffusion_pl.commands.report_settings import published
from diffusion_pl.page.html import Html, Part, paragraph, part, table, tag
from diffusion_pl.page.plots import COLOURS, Line, plot
from diffusion_pl.training.best import HIGHER
from diffusion_pl.training.history import SAME, is_evaluation, is_held_out

MISSING = "not recorded"
KINDS = {"ema": "averaged", "denoiser": "raw"}  # of weights, in words
Key = tuple[Any, ...]


def questions(runs: Sequence[Told]) -> Part:
    """What a number must say to be reproduced, the same five lines for each."""
    cards = []
    for each in runs:
        blocks: dict[tuple[str, ...], list[str]] = {}
        for row in filter(is_evaluation, newest(each).values()):
            names = blocks.setdefault(answers(row), [])
            names.append(row["name"].partition("/")[0])
        for answered, names in blocks.items():
            cards.append(_card(each, dict.fromkeys(names), answered, len(runs) > 1))
    inside = tag("div", *cards, class_="cards") if cards else _unmeasured(runs)
    return part("questions", "The five questions of reproduction", inside)


ASKED = (
    "Which weights?",
    "How many images?",
    "Which extractor?",
    "Which reference?",
    "Which resizing and normalisation?",
)


def answers(row: Row) -> tuple[str, ...]:
    """The answers to ASKED of a row, and how its images were sampled."""
    weights = row.get("weights")
    averaged = f", {row['ema']}" if weights == "ema" and row.get("ema") else ""
    said = f"{KINDS.get(str(weights), weights)}{averaged}" if weights else MISSING
    count = _count(row.get("n"), "generated")
    if row.get("first") is not None and row.get("seed") is not None:
        count += f", from number {row['first']} of seed {row['seed']}"
    features = row.get("features")
    extractor = f"{row.get('extractor') or MISSING}{f', {features}' * bool(features)}"
    known = str(row.get("fingerprint") or MISSING)[:12]
    real = row.get("reference")
    reference = f"{real}, {_count(row.get('reference_n'), 'real')}, {known}" if real else MISSING
    sampled = [
        _said(row[word]) if word == "sampler" else f"{word.replace('_', ' ')} {_said(row[word])}"
        for word in DRAWN
        if row.get(word) is not None
    ]
    sampled += [f"{row['evaluations']:,.6g} evaluations"] if "evaluations" in row else []
    resize = str(row.get("resize") or MISSING)
    return said, count, extractor, reference, resize, ", ".join(sampled) or MISSING


def _card(run: Told, names: Mapping[str, None], answered: Sequence[str], several: bool) -> Html:
    title = ", ".join(names)
    lines = [
        part
        for asked, answer in zip((*ASKED, "How sampled?"), answered, strict=True)
        for part in (tag("dt", asked), tag("dd", answer))
    ]
    of = paragraph(run.name, kind="note") if several else ""
    return tag("div", tag("h3", title), of, tag("dl", *lines), class_="card")


def _count(number: Any, kind: str) -> str:
    return f"{number:,} {kind}" if type(number) is int else MISSING


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def newest(run: Told) -> dict[tuple[Any, ...], Row]:
    """The newest row of each number, sampled and measured in one way; standard deviations apart."""
    return newest_of(run.all_rows)


def newest_of(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    """The same of any rows."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if not word_of(row["name"]).endswith("_std"):
            key = (*key_of(row), *(json.dumps(row.get(word)) for word in DRAWN), row.get("seed"))
            key = tuple(map(str, key))
            if key not in found or found[key]["images"] <= row["images"]:
                found[key] = row
    return found


def word_of(name: str) -> str:
    """The metric of a number: fid of `fid@50000/...`."""
    return name.partition("@")[0]


def numbers(runs: Sequence[Told]) -> Part:
    """The newest value of every number with its provenance, beside what is published."""
    rows: list[tuple[str | None, Sequence[object]]] = []
    for each in runs:
        stds = {row["name"]: row for row in each.all_rows if "_std@" in row["name"]}
        for row in newest(each).values():
            word, _, rest = row["name"].partition("@")
            spread = stds.get(f"{word}_std@{rest}")
            cells = [
                _named(row),
                *([each.name] if len(runs) > 1 else []),
                _value(row, spread),
                f"{row['images']:,}",
                "higher" if HIGHER.get(word) else "lower" if word in HIGHER else "",
                _best(each, row),
                _evaluations(row),
                _said(row.get("seed", MISSING)),
                row.get("commit") or MISSING,
                str(row.get("time") or MISSING).replace("T", " "),
            ]
            rows.append((None, cells))
    if not rows:
        return part("numbers", "Numbers", _unmeasured(runs))
    head = ["number", *(["run"] if len(runs) > 1 else []), "value", "images seen", "better"]
    head += ["best so far", "evaluations an image", "seed", "commit", "time"]
    said = [_published(each, len(runs) > 1) for each in runs]
    return part("numbers", "Numbers", table(head, rows), *said, *_apart(runs))


def _named(row: Row) -> str:
    """A number's name; of a loss with its weights and what it was measured on."""
    if not is_held_out(row):
        return str(row["name"])
    trained = "" if row.get("held_out") else ", which were trained on"
    weights = KINDS.get(row.get("weights", ""), MISSING)
    return f"{row['name']} of {weights} weights on {row.get('which', MISSING)}{trained}"


def _evaluations(row: Row) -> str:
    """Network evaluations an image; none of a loss."""
    if is_held_out(row):
        return ""
    return f"{row['evaluations']:,.6g}" if "evaluations" in row else MISSING


def _value(row: Row, spread: Row | None) -> str:
    """A value, with its standard deviation over parts and the range of its blocks, if known."""
    said = f"{row['value']:.5g}"
    if is_held_out(row) and type(row.get("standard_error")) is float:
        said += f" (standard error {row['standard_error']:.2g})"
    if spread is not None and spread["images"] == row["images"]:
        said += f" (sd {spread['value']:.2g})"
    if len(row.get("blocks", ())) > 1:
        said += f" (blocks {min(row['blocks']):.5g} to {max(row['blocks']):.5g})"
    return said


def _best(run: Told, row: Row) -> str:
    """The best value of a number, and when."""
    higher = HIGHER.get(word_of(row["name"]))
    curve = run.run.curve(key_of(row))
    fit = {at: value for at, value in curve.items() if math.isfinite(value)}
    if higher is None or not fit:
        return ""
    at = (max if higher else min)(fit, key=lambda images: fit[images])
    return f"{fit[at]:.5g} at {at:,}"


def _published(run: Told, several: bool) -> Html:
    """The published number of the run's experiment, in the words of its file."""
    line, apart = published(run)
    before = f"{run.name}: " if several else ""
    if not line:
        return paragraph(
            before, "published: no experiment with these data, network and objective states one",
            kind="note",
        )  # fmt: skip
    settings = f" This run differs from it in: {apart}." if apart else " This run has its settings."
    more = " Numbers of fewer images or of another extractor or reference are not that number."
    return paragraph(before, "published: ", tag("strong", line), ".", settings, more)


def _apart(runs: Sequence[Told]) -> list[Html]:
    """What of the runs' numbers cannot be compared, and what differs though they can."""
    if len(runs) < 2:
        return []
    held = [{key_of(row) for row in newest(each).values()} for each in runs]
    lines = []
    for each, own in zip(runs, held, strict=True):
        alone = [key for key in own if sum(key in other for other in held) == 1]
        for key in sorted(alone, key=str):
            text = (
                f"{each.name} alone has {key[0]} of {_weights(key)} (extractor {key[2]}, "
                f"reference {str(key[1])[:12]}): not comparable with the others, on axes of its own"
            )
            lines.append(paragraph(text, kind="problem"))
        if not own:
            lines.append(paragraph(f"{each.name}: no evaluation yet", kind="note"))
    for key in sorted({key for own in held for key in own}, key=str):
        last = [row for each in runs for row in each.run.measures(key)[-1:]]
        other = [word for word in DRAWN if len({json.dumps(row.get(word)) for row in last}) > 1]
        if other:
            lines.append(paragraph(f"{key[0]}: sampled otherwise: {', '.join(other)}", kind="note"))
    return lines


def _weights(key: Key) -> str:
    weights = key[SAME.index("weights")]
    return f"{KINDS[weights]} weights" if weights in KINDS else str(weights)


def curves(runs: Sequence[Told]) -> Part:
    """The loss and each number by the images seen and by the time of training."""
    figures: list[Html] = []
    note: Html | str = ""
    groups = _losses(runs)
    for members in groups.values():
        figures += _by_both("training loss", [(r, runs[r], _loss(runs[r])) for r in members])
    if len(groups) > 1:
        text = "Losses of other objectives or data are other quantities: each has its own axes."
        note = paragraph(text, kind="problem")
    keys = dict.fromkeys(key_of(row) for each in runs for row in each.all_rows)
    for key in keys:
        if not word_of(key[0]).endswith("_std"):
            held = [(r, each, each.run.curve(key)) for r, each in enumerate(runs)]
            if any(len(curve) > 1 for _, _, curve in held):  # else the table says all
                figures += _by_both(f"{key[0]}, {_weights(key)}", held)
    inside = tag("div", *figures, class_="plots") if figures else paragraph("nothing logged yet")
    return part("curves", "Learning curves", note, inside)


def _losses(runs: Sequence[Told]) -> dict[str, list[int]]:
    """The runs whose losses are one quantity: of one objective and one data set."""
    groups: dict[str, list[int]] = {}
    for number, each in enumerate(runs):
        data = setting(each.record, "data.fingerprints") or setting(each.run.tree, "data.dataset")
        said = [setting(each.run.tree, "objective"), data]
        groups.setdefault(json.dumps(said, sort_keys=True, default=str), []).append(number)
    return groups


def _loss(run: Told) -> dict[int, float]:
    return {row["images"]: row["loss"] for row in run.run.rows if "loss" in row}


def _by_both(title: str, members: Sequence[tuple[int, Told, Mapping[int, float]]]) -> list[Html]:
    """A plot by images and one by hours of training."""
    by_images, by_time = [], []
    for colour, each, curve in members:
        points = sorted(curve.items())
        timed = [(each.run.seconds(images) / 3600, value) for images, value in points]
        by_images.append(Line(each.name, points, colour))
        by_time.append(Line(each.name, timed, colour))
    made = [
        plot(by_images, title=title, x="images seen", log_y=None),
        plot(by_time, title=title, x="hours of training", log_y=None),
    ]
    return [figure for figure in made if figure]


def sweep(runs: Sequence[Told]) -> Part:
    """Numbers by network evaluations an image, a line for each sampler."""
    plots: dict[Key, dict[tuple[int, str], list[tuple[float, float]]]] = {}
    for number, each in enumerate(runs):
        for row in each.sweep:
            if "name" in row and "evaluations" in row and "_std@" not in row["name"]:
                lines = plots.setdefault(key_of(row), {})
                line = lines.setdefault((number, _sampler(row)), [])
                line.append((row["evaluations"], row["value"]))
    several = len(runs) > 1
    figures = [
        plot(
            [
                Line(f"{runs[r].name}: {name}" if several else name, sorted(points), place, r > 0)
                for place, ((r, name), points) in enumerate(lines.items())
            ],
            title=f"{key[0]}, {_weights(key)}",
            x="network evaluations an image",
            log_x=None,
            log_y=None,
        )
        for key, lines in plots.items()
    ]
    if not figures:
        words = hints.command("sweep", runs[0].run.folder, "--steps", "5,9,18")
        return part("sweep", "Sweep of samplers", paragraph("not measured: ", tag("code", words)))
    return part("sweep", "Sweep of samplers", tag("div", *figures, class_="plots"))


def _sampler(row: Row) -> str:
    """A sampler without its number of steps, and its guidance."""
    whole = str(row.get("sampler", ""))
    short = re.search(r"integrate=(?:\w+\.)*(\w+)", whole)
    name = short[1] if short else re.sub(r",? ?steps=\d+", "", whole) or MISSING
    guidance = row.get("guidance")
    return name if guidance in (None, 1, 1.0) else f"{name}, guidance {_said(guidance)}"


def levels(runs: Sequence[Told], drawn: Sequence[Mapping[str, Any] | None]) -> Part:
    """The error at each noise level: as it was measured, else as it was drawn for the report."""
    figures, lines = [], []
    for each, own in zip(runs, drawn, strict=True):
        found = each.losses or _from_training(each) or own or {}
        made = [
            Line(title, _level_points(setting(found, f"levels.{kind}")), colour, kind != "ema")
            for colour, (kind, title) in enumerate(
                (("ema", "averaged weights"), ("denoiser", "raw weights"))
            )
        ]
        title = "error / (sigma² sd² / (sigma² + sd²))"
        figure = plot(made, title=f"{each.name}: {title}", x="sigma", log_x=True, log_y=None)
        figures += _by_level(each)
        if figure:
            figures.append(figure)
            lines.append(f"{each.name}: {_count(found.get('count'), 'images')} of "
                         f"{found.get('data', MISSING)}")  # fmt: skip
        else:
            words = hints.command("losses", each.run.folder)
            figures.append(paragraph(f"{each.name}: not measured: ", tag("code", words)))
    note = "1 is the best linear denoiser of white pixels of the images' variance."
    said = paragraph("; ".join([*lines, note]), kind="note") if lines else ""
    return part("levels", "Loss by noise level", tag("div", *figures, class_="plots"), said)


def _from_training(run: Told) -> dict[str, Any]:
    """The newest held-out losses of training, as `losses` gives them; {} where there are none."""
    last = {kind: rows[-1] for kind, rows in run.held_out.items()}
    if not last:
        return {}
    row = next(iter(last.values()))
    levels = {kind: each["levels"] for kind, each in last.items()}
    return {"levels": levels, "count": row.get("n"), "data": str(row.get("data", MISSING))}


def _by_level(run: Told) -> list[Html]:
    """The held-out loss of averaged weights at each noise level, by the images seen."""
    curves: dict[float, list[tuple[float, float]]] = {}
    for row in run.held_out.get("ema", ()):
        for sigma, loss in _level_points(row["levels"]):
            curves.setdefault(sigma, []).append((row["images"], loss))
    made = [Line(f"sigma {sigma:.3g}", points, place, dashed=place >= COLOURS)
            for place, (sigma, points) in enumerate(sorted(curves.items()))]  # fmt: skip
    if max(map(len, curves.values()), default=0) < 2:
        return []
    title = f"{run.name}: held-out loss by noise level, averaged weights"
    figure = plot(made, title=title, x="images seen", log_y=None)
    return [figure] if figure else []


def _level_points(rows: Any) -> list[tuple[float, float]]:
    """Noise level and weighted error of rows of `losses`."""
    found = []
    for row in rows if isinstance(rows, list) else ():
        sigma, loss = (row.get(key) if isinstance(row, dict) else None for key in ("sigma", "loss"))
        if isinstance(sigma, float | int) and isinstance(loss, float | int) and 0 < sigma < 1e300:
            found.append((float(sigma), loss if abs(loss) < 1e300 else math.nan))
    return found


def _unmeasured(runs: Sequence[Told]) -> Html:
    words = hints.command("evaluate", runs[0].run.folder)
    return paragraph("No evaluation yet: ", tag("code", words))
