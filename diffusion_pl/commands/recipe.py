"""`recipe`: settings for one's own images, each with the evidence for it, as an experiment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import Parameter

from diffusion_pl import config
from diffusion_pl.commands import hints, parts, recommend
from diffusion_pl.commands.options import Integer, TrainOptions
from diffusion_pl.commands.results import Result, line
from diffusion_pl.commands.train import FAILURES, train
from diffusion_pl.data.shard_format import MANIFEST, Manifest
from diffusion_pl.data.shards import Shards
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.evidence import Evidence, Learned, evidence_of, learned
from diffusion_pl.io.files import write_atomically
from diffusion_pl.names import shown
from diffusion_pl.signals import StopRequest
from diffusion_pl.training.history import History, is_held_out

__all__ = ["FAILURES", "command"]

HELD_OUT, LEVELS = 64, 16  # images and noise levels at which it is measured
LEAST, MOST = 0.002, 80.0  # its noise levels, uniform in ln sigma
SAME_MIRRORED = 1.05  # ratio of distances up to which mirror images belong to the data
NARROWEST = 0.6  # P_std, since the levels to learn move while a run goes on
MANY = 0.01  # share of copies that is worth a word
EDM = "diffusion_pl.objectives.edm.EDM"


def command(
    data: Path,
    /,
    *,
    out: Path | None = None,
    hours: float = 1.0,
    probe: Integer = 16_000,
    run: Path | None = None,
    stop_request: Annotated[StopRequest | None, Parameter(parse=False)] = None,
) -> Result:
    """Write an experiment for one's own images, each setting with the evidence for it.

    Looks at the images, trains a small network on them for a short time at all noise levels, and
    takes from both what suits them. The short training is a run like any other, and the same
    command goes on with it.

    Example: diffusion_pl recipe data/mine --hours 2

    Args:
        data: a prepared folder.
        out: the YAML file; experiments/NAME.yaml, or NAME.yaml where there is no such folder.
        hours: of training on this machine, at most; many passes over few images may need less.
        probe: images of the short training, at least 1,000.
        run: folder of the short training; runs/NAME-probe when not given.
        stop_request: set by signals.
    """
    if not (data / MANIFEST).is_file():
        first = hints.command("prepare", data, "DEST", "--resolutions", "64")
        raise UserError(f"{data}: is no prepared folder; prepare the images first: {first}")
    if not 0 < hours < 10_000 or not 1000 <= probe <= 10**9:
        raise UserError(
            f"--hours must be above 0 and --probe at least 1,000 (got {hours:g}, {probe})"
        )
    name = data.resolve().name
    folder = Path("experiments") if Path("experiments").is_dir() else Path()
    out = out or folder / f"{name}.yaml"
    if out.exists():
        raise UserError(f"{out}: exists; name another file by --out")
    manifest = Manifest.read(data)
    on = recommend.machine()
    plan = recommend.plan(manifest, data, on)
    if not plan.overrides:
        raise UserError(plan.lines[0])
    settings = _settings(plan.overrides)
    seen = evidence_of(Shards(str(data), settings["data.dataset.resolution"]).open())
    place = run or parts.RUNS / f"{name}-probe"
    stopped, found, rate = _probed(manifest, data, on, seen, place, probe, stop_request)
    if stopped is not None:
        return stopped
    settings |= _chosen(plan, manifest, seen, found, rate, hours)
    reasons = _reasons(plan, manifest, seen, found, rate, on)
    text = written(plan.experiment, settings, reasons, _head(name, manifest, seen, found, on))
    write_atomically(out, lambda file: file.write(text.encode()))
    parts.read(str(out))  # as `train` will
    values = {
        "experiment": str(out),
        "defaults": plan.experiment,
        "settings": settings,
        "images_per_second": round(rate, 2),
        "hours": _hours(plan, settings, rate),
        "evidence": {**vars(seen), "levels": found.levels},
    }
    lines = [line("written", out), *(line("", each) for each in _summary(settings, reasons))]
    after = [hints.next_line("train", out, "--run", parts.RUNS / name)]
    return Result(values, lines, after, in_pipes=True)


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    """The values of KEY=VALUE words."""
    pairs = (word.partition("=") for word in overrides)
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def _probed(
    manifest: Manifest,
    data: Path,
    on: recommend.Machine,
    seen: Evidence,
    place: Path,
    images: int,
    stop_request: StopRequest | None,
) -> tuple[Result | None, Learned, float]:
    """What a short training found, and its images a second; or its result where it was stopped."""
    quarter = images // 4
    levels = f"sigma_min: {LEAST}, sigma_max: {MOST}"
    objective = (
        "objective={_target_: diffusion_pl.diffusion.objective.Objective, "
        f"schedule: {{_target_: diffusion_pl.diffusion.schedules.LogUniform, {levels}}}, "
        f"preconditioning: {{_target_: diffusion_pl.diffusion.preconditioning.Karras, "
        f"sigma_data: {seen.std:.4g}}}, "
        f"weight: {{_target_: diffusion_pl.diffusion.objective.UnitOutput, "
        f"sigma_data: {seen.std:.4g}}}, "
        "reduce: {_target_: diffusion_pl.diffusion.objective.pixel_sum, _partial_: true}}"
    )
    words = [
        *recommend.small(manifest, data, on).overrides,
        objective,
        # Without a cooldown, after which both budgets would be of different trainings.
        "lr_schedule={_target_: diffusion_pl.training.lr_schedule.WarmupDecay, warmup: 1000}",
        f"ema={{_target_: diffusion_pl.training.ema.EMA, half_life: {quarter // 4}, ramp_up: 0.1}}",
        f"trainer.total_images={4 * quarter}",
        f"trainer.checkpoint_every={quarter}",
        f"trainer.log_every={max(1, quarter // 5)}",
        f"evaluation.every={4 * quarter}",
        "evaluation.count=1",
        "evaluation.metrics=[]",
        f"evaluation.losses={{_target_: diffusion_pl.evaluation.settings.Losses, every: {quarter}, "
        f"count: {min(HELD_OUT, manifest.count)}, levels: {LEVELS}}}",
    ]
    experiment = parts.read(recommend.SMALL, words)
    result = train(experiment, place, stop_request or StopRequest(), TrainOptions())
    if result.code:
        return result, Learned((), 0.0, 0.0), 0.0
    rows = History(place / "metrics.jsonl").rows()
    held = {
        row["images"]: row["levels"]
        for row in rows
        if is_held_out(row) and row.get("weights") == "ema"
    }
    batch = config.build(experiment, "data").batch_size
    first = min(held, key=lambda seen_then: abs(seen_then - quarter))
    rate = statistics.median(row["images_per_second"] for row in rows if "images_per_second" in row)
    if max(held) - first < batch:
        raise UserError(f"{place}: its short training has one measurement; choose another --run")
    return None, learned(held[first], held[max(held)]), rate


def _chosen(
    plan: recommend.Plan,
    manifest: Manifest,
    seen: Evidence,
    found: Learned,
    rate: float,
    hours: float,
) -> dict[str, Any]:
    """The settings that follow from the evidence."""
    settings: dict[str, Any] = {}
    small = plan.experiment == recommend.SMALL
    if small:
        images = int(min(rate * hours * 3600, recommend.EPOCHS * manifest.count))
        images = max(4000, images - images % 400)
        settings |= _settings(recommend.of_budget(images, manifest.count))
    if seen.mirrored is not None:
        settings["data.hflip"] = seen.mirrored <= SAME_MIRRORED
    if config.load(plan.experiment, plan.overrides).get("objective._target_") == EDM:
        settings |= {
            "objective.sigma_data": float(f"{seen.std:.3g}"),
            "objective.P_mean": round(found.P_mean, 2),
            "objective.P_std": round(max(found.P_std, NARROWEST), 2),
        }
    return settings


def _hours(plan: recommend.Plan, settings: Mapping[str, Any], rate: float) -> float | None:
    """How long the training takes: measured of the small network, else as `prepare` estimates."""
    if plan.experiment == recommend.SMALL:
        return float(round(settings["trainer.total_images"] / rate / 3600, 3))
    return plan.seconds and round(plan.seconds / 3600, 1)


def _reasons(
    plan: recommend.Plan,
    manifest: Manifest,
    seen: Evidence,
    found: Learned,
    rate: float,
    on: recommend.Machine,
) -> dict[str, str]:
    """Why each setting is what it is."""
    reasons = {
        "data.dataset.resolution": f"of {', '.join(map(str, manifest.resolutions))} px prepared",
        "data.batch_size": f"of {plan.experiment}, whose learning rates go with it",
        "network.classes": "labels" if manifest.classes else "no labels",
        "network.model_channels": f"small: what {on.name} trains in the time",
        "network.channel_mult": "halved down to about 8 px",
        "network.attention": "at the lowest level",
        "objective.sigma_data": "standard deviation of all values, measured",
        "objective.P_mean": "mean of ln sigma where the loss fell in the short training, see above",
        "objective.P_std": "its standard deviation"
        + (f", {found.P_std:.2f}, but not below {NARROWEST}" * (found.P_std < NARROWEST)),
        "trainer.total_images": f"at {rate:.0f} images a second, measured, and at most "
        f"{recommend.EPOCHS} passes over the data",
        "ema.half_life": "a twelfth of the budget",
        "lr_schedule.cooldown": "three quarters of the budget",
    }
    if seen.mirrored is not None:
        same = (
            "as near to others as" if seen.mirrored <= SAME_MIRRORED else "farther from others than"
        )
        reasons["data.hflip"] = f"mirrored images are {same} the images: {seen.mirrored:.2f} times"
    return reasons


def _head(
    name: str, manifest: Manifest, seen: Evidence, found: Learned, on: recommend.Machine
) -> list[str]:
    """The evidence, as lines of a comment; the first is what `experiments` lists."""
    counts = sorted(seen.class_counts)
    classes = (
        f", {manifest.classes} classes ({counts[0]:,} to {counts[-1]:,} each)" if counts else ""
    )
    lines = [
        f"{shown(name)}: settings that `recipe` found for its images (no published number)",
        "",
        f"Images    {manifest.count:,}{classes if seen.seen == manifest.count else ''}; "
        f"{seen.seen:,} looked at; on {on.name}, {time.strftime('%Y-%m-%d')}",
        f"Values    mean {seen.mean:.3f}, standard deviation {seen.std:.3f} in [-1, 1]",
    ]
    if seen.slope is not None and seen.fine is not None:
        lines.append(
            f"Spectrum  power ~ 1 / f^{seen.slope:.2f} (photographs: 2 to 3), {seen.fine:.1%} "
            "of it above half of the Nyquist frequency"
        )
    near = "" if seen.near is None else f"; near copies of another: {seen.near:.1%}"
    warning = (
        " -- take them out first: a network learns them by heart"
        if max(seen.copies, seen.near or 0) > MANY
        else ""
    )
    lines += [f"Copies    equal to another image: {seen.copies:.1%}{near}{warning}", ""]
    lines += ["Loss of a short training, EDM's weight: after a quarter of it, after all of it, and"]
    lines += ["what of it fell below 1:", ""]
    lines.append("     sigma    quarter      whole       fall")
    lines += [
        f"{sigma:10.4g} {one:10.4f} {two:10.4f} {fall:10.4f}"
        for sigma, one, two, fall in found.levels
    ]
    return lines


def written(
    defaults: str,
    settings: Mapping[str, Any],
    reasons: Mapping[str, str],
    head: Sequence[str],
) -> str:
    """The YAML of an experiment.

    Args:
        defaults: what it is built on.
        settings: dotted key to value.
        reasons: dotted key to a comment.
        head: lines of the comment before.
    """
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *above, last = key.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    lines = [f"# {each}".rstrip() for each in head]
    lines += ["", f"defaults: {defaults}"]
    for section, node in tree.items():
        lines += ["", *_node(section, node, section, reasons, "")]
    return "\n".join(lines) + "\n"


def _node(key: str, value: Any, path: str, reasons: Mapping[str, str], indent: str) -> list[str]:
    why = f"  # {reasons[path]}" if path in reasons else ""
    if isinstance(value, dict):
        lines = [f"{indent}{key}:{why}"]
        for name, inner in value.items():
            lines += _node(name, inner, f"{path}.{name}", reasons, f"{indent}  ")
        return lines
    said = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
    return [f"{indent}{key}: {said.removesuffix(chr(10)).removesuffix(chr(10) + '...')}{why}"]


def _summary(settings: Mapping[str, Any], reasons: Mapping[str, str]) -> list[str]:
    return [f"{key}={settings[key]}  {reasons[key]}" for key in settings if key in reasons]
