"""`compare`: what differs between runs, and how they fare at equal images and at equal time.

Only numbers of one name, one data set and one extractor stand side by side.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_pl import config
from diffusion_pl.commands import hints
from diffusion_pl.commands.options import RunFolder
from diffusion_pl.commands.results import Result
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small
from diffusion_pl.progress import clock
from diffusion_pl.training.best import HIGHER
from diffusion_pl.training.history import RECORD, SAME, History, is_evaluation, is_held_out

MOST = 8  # rows of a table
LONGEST = 28  # characters of a setting in a table
BLOCKS = 5  # asked for where a number has no interval

# How images were sampled and what they were asked to be: a part of the recipe, so it may differ,
# but is said. Of several prompts a row has their number and digest; "captions" are the data's.
DRAWN = (
    "sampler", "guidance", "guidance_interval", "guide", "labels", "label", "prompt", "prompts",
    "captions", "source",
)  # fmt: skip

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """What a run's folder says of it.

    Args:
        name: the folder's, or its path where another run has that name.
        folder: the run's.
        tree: its config, resolved.
        rows: of metrics.jsonl, in the order of the images.
        evaluations: rows of `evaluate`.
        encoder: of the captions, its name and digest; None where no text is known.
    """

    name: str
    folder: Path
    tree: Mapping[str, Any]
    rows: Sequence[Row]
    evaluations: Sequence[Row]
    encoder: str | None = None

    @property
    def images(self) -> int:
        """Images seen so far."""
        return max((row["images"] for row in self.rows), default=0)

    @property
    def budget(self) -> int:
        """Images it is to see."""
        budget: int = self.tree["trainer"]["total_images"]
        return budget

    def seconds(self, images: float) -> float:
        """Time of training alone up to a number of images; nan where it was not logged."""
        spent, seen = 0.0, 0
        for row in self.rows:
            if row.get("images_per_second"):
                spent += (min(row["images"], images) - seen) / row["images_per_second"]
                seen = row["images"]
                if seen >= images:
                    return spent
        return spent if seen else math.nan

    def measures(self, key: Sequence[Any]) -> list[Row]:
        """The rows of a number: those of training, else those of `evaluate`."""
        own = [row for row in self.rows if key_of(row) == key]
        return own or [row for row in self.evaluations if key_of(row) == key]

    def curve(self, key: Sequence[Any]) -> dict[int, float]:
        """A number by the images seen."""
        return {row["images"]: row["value"] for row in self.measures(key)}

    def interval(self, key: Sequence[Any]) -> tuple[float, float] | None:
        """The 95 % interval of a number's mean over blocks of images of the newest checkpoint, or
        of a held-out loss over its images."""
        last = self.measures(key)[-1:]
        for row in last:
            error, count = row.get("standard_error"), row.get("n")
            if is_held_out(row) and type(error) is float and type(count) is int and count > 1:
                return _around(row["value"], error, count)
        for row in reversed(self.evaluations):
            values = row.get("blocks", ())
            same = all(_drawn(row) == _drawn(other) for other in last) and key_of(row) == key
            if same and row["images"] == self.images and len(values) > 1:
                return interval_of(values)
        return None


def interval_of(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean over blocks of images, by Student's t distribution.

    Args:
        values: of the blocks, at least two.
    """
    count = len(values)
    return _around(statistics.fmean(values), statistics.stdev(values) / count**0.5, count)


def _around(mean: float, error: float, count: int) -> tuple[float, float]:
    """The interval around a mean of so many values that has this standard error."""
    from scipy.stats import t as student  # half a second of CPU

    reach = float(student.ppf(0.975, count - 1)) * error
    return mean - reach, mean + reach


def command(run: RunFolder, other: RunFolder, /, *more: Path) -> Result:
    """Compare runs: their settings, their metrics at equal images and at equal time, a verdict.

    Time is that of training alone. A run is called better only where the 95 % intervals over
    blocks of images part, which `evaluate RUN --blocks 5` measures; they hold the chance of
    sampling, not that of training.

    Example: diffusion_pl compare runs/mine runs/other

    Args:
        more: further runs.
    """
    found = opened([run, other, *more])
    apart = differing(found)
    groups = comparable(found)
    lines = [
        *table(["", *(each.name for each in found)], [_seen(found), _spent(found)]),
        "",
        *(_settings(apart, found) if apart else ["the same settings"]),
        *_losses(found),
    ]
    verdicts = {}
    for key in groups:
        told, verdict = _judged(key, found)
        lines += ["", *told]
        verdicts[_title(key)] = verdict
    lines += _alone(found, groups)
    values = {
        "runs": [str(each.folder) for each in found],
        "images": [each.images for each in found],
        "seconds": [_rounded(each.seconds(each.images)) for each in found],
        "settings": apart,
        "metrics": {_title(key): [each.curve(key) for each in found] for key in groups},
        "verdicts": verdicts,
    }
    return Result(values, lines, in_pipes=True)


def opened(folders: Sequence[Path]) -> list[Measured]:
    """Read the folders of runs.

    Raises:
        UserError: no run, one that is damaged or given twice.
    """
    return [read(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The names of runs: their folders', or the paths where two have one name.

    Raises:
        UserError: a run is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; name different ones")
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder)
        for folder, name in zip(folders, names, strict=True)
    ]


def read(folder: Path, name: str) -> Measured:
    """Read a run's folder, without its weights.

    Raises:
        UserError: there is no run, or its files are damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: there is no run here (no config.yaml)")
    rows = History(folder / "metrics.jsonl").rows()
    rows.sort(key=lambda row: row["images"])
    evaluations = History(folder / "evaluations.jsonl", name=str).rows()
    tree = config.load(folder / "config.yaml").tree
    try:
        record = json.loads(read_small(folder / RECORD))
    except (OSError, ValueError, RecursionError):
        record = None
    return Measured(name, folder, tree, rows, evaluations, encoder_of(record))


def encoder_of(record: Any) -> str | None:
    """The encoder of a run's captions, by its run.json: name and digest; None without text."""
    for key in ("data", "text"):
        record = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(record, Mapping):
        return None
    return f"{record.get('encoder')} {str(record.get('digest'))[:12]}"


def key_of(row: Row) -> tuple[Any, ...]:
    """What identifies a number; () of a row that has none."""
    return tuple(row.get(key) for key in SAME) if "name" in row else ()


def differing(found: Sequence[Measured]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs, as JSON; "absent" where a run has none."""
    trees = [dict(flat("", each.tree)) for each in found]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    rows = {key: [tree.get(key, "absent") for tree in trees] for key in keys}
    # "auto" and a name say neither which encoder it was nor which weights it had.
    rows["text encoder"] = [json.dumps(each.encoder) for each in found]
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """The settings below a key, as JSON; a list of plain values is one of them."""
    nested = isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value)
    if isinstance(value, Mapping) or nested:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, each in items:
            yield from flat(f"{key}.{name}" if key else str(name), each)
    else:
        yield key, json.dumps(value, ensure_ascii=False)


def comparable(found: Sequence[Measured]) -> list[tuple[Any, ...]]:
    """The numbers that at least two runs have."""
    keys = [
        dict.fromkeys(key_of(row) for row in [*each.rows, *each.evaluations] if "name" in row)
        for each in found
    ]
    return [
        key
        for key in dict.fromkeys(key for own in keys for key in own)
        if sum(key in own for own in keys) > 1 and not _word(key).endswith("_std")
    ]


def evenly(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)
) -> list[str]:
    """Lines of a table; the columns of `left` to the left, the others to the right."""
    whole = [head, *rows]
    widths = [max(len(row[column]) for row in whole) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in whole
    ]


def _seen(found: Sequence[Measured]) -> list[str]:
    return ["images", *(f"{each.images:,} of {each.budget:,}" for each in found)]


def _spent(found: Sequence[Measured]) -> list[str]:
    return ["training", *(_clock(each.seconds(each.images)) for each in found)]


def _settings(apart: Mapping[str, Sequence[str]], found: Sequence[Measured]) -> list[str]:
    """A table of the settings that differ."""
    rows = [[key, *map(_short, values)] for key, values in apart.items()]
    return ["settings that differ", *_indented(table(["", *(each.name for each in found)], rows))]


def _short(value: str) -> str:
    """A value in a table: of a dotted name its last part, of a long text its beginning."""
    bare = value.strip('"')
    last = bare.rpartition(".")[2] if re.fullmatch(r"[A-Za-z_][\w.]*", bare) else bare
    return last if len(last) <= LONGEST else f"{last[: LONGEST - 3]}..."


def _losses(found: Sequence[Measured]) -> list[str]:
    """The loss at equal images, where it is the same quantity."""
    if any(each.tree["objective"] != found[0].tree["objective"] for each in found):
        return ["", "loss: of other objectives, so not compared"]
    curves = [{r["images"]: r["loss"] for r in each.rows if "loss" in r} for each in found]
    return ["", *_at_images("loss", curves, found)] if all(curves) else []


def _at_images(
    title: str, curves: Sequence[Mapping[int, float]], found: Sequence[Measured]
) -> list[str]:
    """Values at equal images; - where a run was not measured there."""
    points = evenly(sorted({images for curve in curves for images in curve}), MOST)
    rows = [[f"{at:,}", *(_number(curve.get(at)) for curve in curves)] for at in points]
    return [title, *_indented(table(["images", *(each.name for each in found)], rows))]


def _at_times(curves: Sequence[Mapping[int, float]], found: Sequence[Measured]) -> list[str]:
    """The newest value of each run at equal times of training."""
    timed = [
        sorted((each.seconds(images), value) for images, value in curve.items())
        for each, curve in zip(found, curves, strict=True)
    ]
    if any(math.isnan(seconds) for curve in timed for seconds, _ in curve):
        return []

    def newest(curve: Sequence[tuple[float, float]], now: float) -> float | None:
        past = [value for seconds, value in curve if seconds <= now]
        return past[-1] if past else None

    points = evenly(sorted({seconds for curve in timed for seconds, _ in curve}), MOST)
    rows = [[_clock(now), *(_number(newest(curve, now)) for curve in timed)] for now in points]
    return _indented(table(["time", *(each.name for each in found)], rows))


def _judged(key: Sequence[Any], found: Sequence[Measured]) -> tuple[list[str], str]:
    """The curves of a number, and what can be said of the runs' last values."""
    word = _word(key)
    better = "higher" if HIGHER.get(word) else "lower"
    curves = [each.curve(key) for each in found]
    lines = _at_images(f"{_title(key)}  ({better} is better)", curves, found)
    lines += _at_times(curves, found)
    lines += _drawn_otherwise(key, found)
    intervals = {each.name: each.interval(key) for each in found}
    known = {name: ends for name, ends in intervals.items() if ends is not None}
    for name, (low, high) in known.items():
        lines.append(f"  {name}: {low:.4g} to {high:.4g}")
    verdict = _verdict(known, HIGHER.get(word, False))
    if len(known) < len(found) and not any(is_held_out(row) for row in found[0].measures(key)):
        lacking = next(each for each in found if intervals[each.name] is None)
        again = hints.command("evaluate", lacking.folder, "--blocks", BLOCKS)
        lines.append(f"  no interval of {lacking.name}: {again}")
    return [*lines, f"  verdict: {verdict}"], verdict


def _verdict(known: Mapping[str, tuple[float, float]], higher: bool) -> str:
    """The run whose interval lies apart from all others on the better side."""
    if len(known) < 2:
        return "cannot be told without intervals"
    best = min(known, key=lambda name: -known[name][0] if higher else known[name][1])
    low, high = known[best]
    for name, (least, most) in known.items():
        if name != best and not (most < low if higher else high < least):
            return f"cannot be told, the intervals of {best} and {name} overlap"
    return f"{best} is better"


def _drawn_otherwise(key: Sequence[Any], found: Sequence[Measured]) -> list[str]:
    """What of the sampling differs, since it is then compared too."""
    own = {each.name: each.measures(key)[-1] for each in found if each.measures(key)}
    rows = []
    for word in DRAWN:
        said = [json.dumps(row.get(word), ensure_ascii=False) for row in own.values()]
        if len(set(said)) > 1:
            rows.append([word, *("-" if value == "null" else _short(value) for value in said)])
    if not rows:
        return []
    head = f"  drawn otherwise: {', '.join(row[0] for row in rows)}"
    return [head, *_indented(_indented(table(["", *own], rows)))]


def _alone(found: Sequence[Measured], groups: Sequence[tuple[Any, ...]]) -> list[str]:
    """Numbers that stand alone: another data set, extractor or count of images."""
    lines = []
    for each in found:
        rows = [*each.rows, *each.evaluations]
        own = dict.fromkeys(key_of(row) for row in rows if "name" in row)
        alone = [_title(k) for k in own if k not in groups and not _word(k).endswith("_std")]
        if alone:
            lines.append(f"{each.name} alone has {', '.join(alone)}: not compared")
        if not any(is_evaluation(row) for row in rows):
            lines.append(f"{each.name}: no evaluation yet")
    return ["", *lines] if lines else []


def _drawn(row: Row) -> list[Any]:
    return [row.get(word) for word in DRAWN]


def _title(key: Sequence[Any]) -> str:
    """The name of a number, with the weights where they are not the averaged ones."""
    weights = key[SAME.index("weights")]
    return f"{key[0]}" if weights in (None, "ema") else f"{key[0]} of {weights}"


def _word(key: Sequence[Any]) -> str:
    """The metric of a number: fid of `fid@50000/...`."""
    return str(key[0]).partition("@")[0]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _clock(seconds: float) -> str:
    return "-" if math.isnan(seconds) else clock(seconds)


def _rounded(seconds: float) -> float | None:
    return None if math.isnan(seconds) else round(seconds, 1)


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {each}" for each in lines]
