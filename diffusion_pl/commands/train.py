"""`train`: from an experiment's name to a finished run; the same command again goes on."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from diffusion_pl import config, ranks
from diffusion_pl.commands import parts, starting, trust
from diffusion_pl.commands.settling import FAILED, settle
from diffusion_pl.config import Config
from diffusion_pl.data.readers import ReaderLost
from diffusion_pl.data.shard_workers import WorkerLost
from diffusion_pl.names import shown
from diffusion_pl.signals import MARKER, RESUMABLE, Wish
from diffusion_pl.training import bounds
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.evaluating import is_evaluated
from diffusion_pl.training.history import History
from diffusion_pl.training.meeting import NotMet, see_place, starter
from diffusion_pl.training.run import Experiment, fit, last_measurements
from diffusion_pl.training.sanity import NonFinite
from diffusion_pl.training.settings import Settings
from diffusion_pl.training.writing import sweep, write_atomically

FAILURES: tuple[type[Exception], ...] = (NonFinite, WorkerLost, ReaderLost, NotMet)


def run(options: argparse.Namespace) -> int:
    """Train, then say where the run lies, what was measured and how to draw more."""
    bounds.end_with_parent()
    wish: Wish = options.wish
    experiment = parts.read(
        options.experiment, options.overrides, allow=options.allow, beside=options.start
    )
    trust.check_training(experiment)
    folder: Path = options.run or parts.RUNS / experiment.name
    see_ranks(config.build(experiment, "trainer"))
    leads = ranks.leads_run()
    start = None
    if not options.start and (options.fresh_labels or options.accept_differences):
        raise ValueError("--fresh-labels, --accept-differences: each belongs to --from RUN")
    if options.start and not checkpoints.found(folder / "checkpoints"):
        start = starting.weights(options, experiment, leads)  # refused before the folder is made
    settle(experiment, folder, options.start)
    if leads:
        sweep(folder)
        History(folder / "metrics.jsonl").mend()
    latest = checkpoints.newest_sound(folder / "checkpoints")
    batch_size = experiment.get("data.batch_size")
    budget = config.build(experiment, "trainer").steps(batch_size) * batch_size
    done = int(latest.stem) if latest else 0
    evaluation = config.build(experiment, "evaluation")
    if done >= budget and is_evaluated(folder, evaluation, done):
        if leads:
            print(f"{shown(str(folder))} is finished: {done:,} images", file=sys.stderr)
            report(folder, done, last_measurements(History(folder / "metrics.jsonl")))
        return 0
    if latest and not done:
        raise ValueError(
            f"{folder}: holds imported weights, not a run to go on with; fine-tune them in another "
            f"folder: train {options.experiment} --from {folder} --run OTHER"
        )
    if latest and leads:
        print(f"{shown(str(folder))}: going on from {done:,} of {budget:,} images", file=sys.stderr)
    built = build(experiment)
    if start is not None and not latest:
        start.fill(built.objective.denoiser(built.network))
    try:
        for name in (MARKER, FAILED):
            (folder / name).unlink(missing_ok=True)
        result = fit(built, folder, parts.REFERENCES, wish)
    except NonFinite as error:
        kept = checkpoints.latest(folder / "checkpoints")
        failed = NonFinite(
            error.step,
            f"{error}; the last good checkpoint is {kept or 'none'}; to look at the step: "
            f"python -m diffusion_pl replay {shlex.quote(str(folder))} --step {error.step}",
        )
        write_atomically(folder / FAILED, lambda file: file.write(f"{failed}\n".encode()))
        raise failed from error
    if leads and result["stopped"]:
        images = f"{result['images']:,} of {budget:,} images"
        print(shown(f"{folder}: stopped at {images}; the same command goes on"), file=sys.stderr)
    elif leads:
        report(folder, result["images"], result["rows"])
    # Lightning would kill the others if one that it started ended with any other code.
    return RESUMABLE if result["stopped"] and not ranks.is_helper() else 0


def see_ranks(settings: Settings) -> None:
    """See who started this process, and that its run's ranks can meet.

    Raises:
        ValueError: they cannot, or the environment speaks of other ranks.
    """
    devices = settings.devices_a_node()
    by = starter(os.environ, settings.nodes, devices)
    if settings.nodes * devices > 1:
        see_place(os.environ, by, ranks.leads_run(), settings.nodes)


def build(experiment: Config) -> Experiment:
    """Build every part of an experiment.

    The weights are drawn from the experiment's seed, whatever was drawn before.
    """
    objective = config.build(experiment, "objective")
    torch.manual_seed(experiment.get("seed"))
    return Experiment(
        name=experiment.name,
        config=experiment.tree,
        seed=experiment.get("seed"),
        settings=config.build(experiment, "trainer"),
        data=trust.data_of(experiment),
        network=config.build(experiment, "network"),
        objective=objective,
        optimizer=config.build(experiment, "optimizer"),
        ema=config.build(experiment, "ema"),
        sampler=parts.sampler_of(experiment, objective),
        extractor=trust.extractor_of(experiment),
        evaluation=config.build(experiment, "evaluation"),
        augment=config.build(experiment, "augment"),
    )


def sample_command(folder: Path) -> str:
    """What to type for more images; make would read a $ and split at a space, however quoted."""
    name = str(folder)
    if re.fullmatch(r"[\w./+,@:=-]+", name):
        return f"make sample RUN={name} COUNT=64"
    return f"python -m diffusion_pl sample {shlex.quote(name)} --count 64"


def report(folder: Path, images: int, rows: list[dict[str, Any]]) -> None:
    """Say on stdout where the run lies, what was measured last and how to draw more."""
    print(f"run      {shown(str(folder))}  ({images:,} images)")
    for row in rows:
        print(f"measured {shown(str(row['name']))} = {row['value']:.4g}")
    grids = sorted((folder / "samples").glob("*.png"))
    if grids:
        print(f"samples  {shown(str(grids[-1]))}")
    print(f"more     {shown(sample_command(folder))}")
