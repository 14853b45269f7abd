"""The parts of a report that tell what was run: settings, published numbers, cost, environment."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffusion_pl import config
from diffusion_pl.commands.compare import flat
from diffusion_pl.commands.report_read import Told, setting
from diffusion_pl.page.html import Part, paragraph, part, table, tag
from diffusion_pl.progress import clock

# The rows of a paper's table, each a setting, or a section whose parts are listed.
PAPER = {
    "data": "data.dataset",
    "augmentation": "augment",
    "network": "network",
    "objective": "objective",
    "extra losses": "extra_losses",
    "optimizer": "optimizer",
    "learning rate over time": "lr_schedule",
    "batch size": "data.batch_size",
    "horizontal flips": "data.hflip",
    "images in training": "trainer.total_images",
    "averaging of weights": "ema",
    "dropout of conditions": "trainer.dropout",
    "precision": "trainer.precision",
    "sampler": "sampler",
}
# What a run shares with the experiment whose published number stands beside its own.
SAME_RECIPE = ("network", "objective", "data.dataset._target_")
NOT_TOLD = ("made_of", "cache", "cache_bytes", "cache_folder")  # of the data, in the short table


def what_was_run(runs: Sequence[Told]) -> Part:
    """Settings as a paper's table, those that differ marked, and all of them below."""
    names = ["", *(each.name for each in runs)]
    every = [dict(flat("", each.run.tree)) for each in runs]
    keys = dict.fromkeys(key for tree in every for key in tree)
    rows = [
        _row(key, [_plain(tree[key]) if key in tree else "absent" for tree in every])
        for key in keys
    ]
    differ = sum(kind is not None for kind, _ in rows)
    said = (
        [paragraph(f"{differ:,} settings differ; their rows are marked.", kind="note")]
        if len(runs) > 1
        else []
    )
    return part(
        "run",
        "What was run",
        *said,
        table(names, [*_progress(runs), *_paper(runs)]),
        tag("details", tag("summary", f"all {len(rows):,} settings"), table(names, rows)),
    )


def _progress(runs: Sequence[Told]) -> Iterator[tuple[str | None, Sequence[object]]]:
    yield None, ["state", *(f"{each.state}{f': {each.why}' * bool(each.why)}" for each in runs)]
    seen = [f"{each.run.images:,}" + f" of {each.budget:,}" * bool(each.budget) for each in runs]
    yield None, ["images seen", *seen]


def _paper(runs: Sequence[Told]) -> Iterator[tuple[str | None, Sequence[object]]]:
    for title, key in PAPER.items():
        values = [in_words(setting(each.run.tree, key)) for each in runs]
        if any(values):
            yield _row(title, [value or "none" for value in values])
    if any(each.run.encoder for each in runs):
        yield _row("text encoder", [each.run.encoder or "none" for each in runs])


def _row(title: str, values: Sequence[str]) -> tuple[str | None, Sequence[object]]:
    return ("differs" if len(set(values)) > 1 else None), [title, *values]


def in_words(value: Any) -> str:
    """A setting in words: of an object its name and arguments."""
    if isinstance(value, Mapping):
        target = str(value.get("_target_", "")).rpartition(".")[2]
        rest = [
            f"{key} {in_words(each) or 'none'}"
            for key, each in value.items()
            if not str(key).startswith("_") and key not in NOT_TOLD
        ]
        return f"{target} ({', '.join(rest)})" if target and rest else target or ", ".join(rest)
    if isinstance(value, list):
        return f"[{', '.join(map(in_words, value))}]"
    if type(value) is int:
        return f"{value:,}"
    return "" if value is None else _plain(json.dumps(value, ensure_ascii=False))


def _plain(value: str) -> str:
    """JSON without the quotes of a text."""
    return str(json.loads(value)) if value.startswith('"') else value


def published(run: Told) -> tuple[str, str]:
    """The published number of the experiment that a run trains, and what the run has otherwise.

    It is the experiment of the run's name, else one with the same data set, network and objective;
    ("", "") where none of them states a number.
    """
    tree, own = run.run.tree, run.run.folder.resolve().name
    for name, (line, stated) in sorted(_stated().items(), key=lambda each: each[0] != own):
        if all(setting(tree, key) == setting(stated, key) for key in SAME_RECIPE):
            ours, theirs = dict(flat("", tree)), dict(flat("", stated))
            apart = [k for k in {**theirs, **ours} if ours.get(k) != theirs.get(k)]
            return f"{name}: {line}", ", ".join(apart)
    return "", ""


@functools.cache
def _stated() -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The experiments that state a published number: their first line and their settings."""
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, line in config.all_experiments().items():
        if re.search(r"\b(FID|IS|NLL) \S*\d", line):
            with contextlib.suppress(ValueError):
                found[name] = line, config.load(name).tree
    return found


def cost(runs: Sequence[Told]) -> Part:
    """Throughput, device hours, and what evaluations took."""
    made: list[tuple[str, Callable[[Told], str]]] = [
        ("images a second (median)", _speed),
        ("devices", lambda each: f"{_devices(each):,}" if _devices(each) else "not recorded"),
        ("time of training", lambda each: _clock(each.run.seconds(each.run.images))),
        ("device hours of training", _hours),
        ("time of evaluations", _evaluating),
        ("begun", lambda each: _times(each)[0]),
        ("newest row", lambda each: _times(each)[-1]),
    ]
    rows: list[tuple[str | None, Sequence[object]]] = [
        (None, [title, *(say(each) for each in runs)]) for title, say in made
    ]
    note = "Training alone: evaluations, saving and stops are not counted in its time."
    names = ["", *(each.name for each in runs)]
    return part("cost", "Throughput and cost", table(names, rows), paragraph(note, kind="note"))


def environment(runs: Sequence[Told]) -> Part:
    """Code, libraries and hardware of the newest number of each run."""
    found: list[dict[str, str]] = []
    for each in runs:
        last = each.all_rows[-1] if each.all_rows else {}
        versions = last.get("versions")
        own = {"code that trained": str(each.record.get("code", "not recorded"))}
        for key in ("commit", "hardware", "ranks", "precision"):
            if last.get(key) is not None:
                own[key] = str(last[key])
        if isinstance(versions, Mapping):
            own |= {str(key): str(value) for key, value in versions.items()}
        found.append(own)
    keys = dict.fromkeys(key for own in found for key in own)
    rows = [_row(key, [own.get(key, "not recorded") for own in found]) for key in keys]
    names = ["", *(each.name for each in runs)]
    note = "Commit, hardware and versions are those of the newest evaluation."
    return part("environment", "Environment", table(names, rows), paragraph(note, kind="note"))


def _speed(run: Told) -> str:
    speeds = [row["images_per_second"] for row in run.run.rows if "images_per_second" in row]
    return f"{statistics.median(speeds):,.4g}" if speeds else "not recorded"


def _devices(run: Told) -> int:
    """Devices of all nodes; 0 where the settings leave them open."""
    devices, nodes = (setting(run.run.tree, f"trainer.{key}") for key in ("devices", "nodes"))
    return devices * (nodes if type(nodes) is int else 1) if type(devices) is int else 0


def _hours(run: Told) -> str:
    seconds, devices = run.run.seconds(run.run.images), _devices(run)
    if math.isnan(seconds) or not devices:
        return "not recorded"
    return f"{seconds * devices / 3600:.3g}"


def _evaluating(run: Told) -> str:
    """The time of all evaluations; the rows of one share it."""
    each = {(row["images"], row.get("time")): row.get("seconds", 0.0) for row in run.all_rows}
    return _clock(math.fsum(each.values())) if each else "none yet"


def _times(run: Told) -> list[str]:
    """When the oldest and the newest row were written."""
    found = []
    for row in (*run.run.rows, *run.run.evaluations):
        try:
            found.append(datetime.datetime.fromisoformat(str(row.get("time"))).isoformat(" "))
        except ValueError:
            continue
    return [min(found), max(found)] if found else ["not recorded"]


def _clock(seconds: float) -> str:
    return clock(seconds) if math.isfinite(seconds) else "not recorded"
