"""`train`: from an experiment's name to a finished run; the same command again goes on."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from diffusion_pl import config
from diffusion_pl.commands import parts, runs
from diffusion_pl.config import Config
from diffusion_pl.data.shard_workers import WorkerLost
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.checkpoint import write_atomically
from diffusion_pl.training.history import History
from diffusion_pl.training.module import NonFiniteLoss
from diffusion_pl.training.run import Experiment, fit, last_measurements
from diffusion_pl.training.stopping import MARKER, RESUMABLE, Wish

FAILURES: tuple[type[Exception], ...] = (NonFiniteLoss, WorkerLost)


def run(options: argparse.Namespace) -> int:
    """Train, then say where the run lies, what was measured and how to draw more."""
    with Wish() as wish:  # first of all: a signal while it starts must not lose the run's place
        return _run(options, wish)


def _run(options: argparse.Namespace, wish: Wish) -> int:
    experiment = parts.read(options.experiment, options.overrides)
    folder: Path = options.run or parts.RUNS / experiment.name
    settle(experiment, folder, options.start)
    latest = checkpoints.newest_sound(folder / "checkpoints")
    batch_size = experiment.get("data.batch_size")
    budget = config.build(experiment, "trainer").steps(batch_size) * batch_size
    done = int(latest.stem) if latest else 0
    if done >= budget:  # the last checkpoint is written after the last evaluation
        print(f"{folder} is finished: {done:,} images", file=sys.stderr)
        report(folder, done, last_measurements(History(folder / "metrics.jsonl")))
        return 0
    leads = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if latest and not done:
        raise ValueError(
            f"{folder}: holds imported weights, not a run to go on with; fine-tune them in another "
            f"folder: train {options.experiment} --from {folder} --run OTHER"
        )
    if latest and leads:
        print(f"{folder}: going on from {done:,} of {budget:,} images", file=sys.stderr)
    built = build(experiment)
    if options.start and not latest:
        start_from(built, options.start)
    try:
        (folder / MARKER).unlink(missing_ok=True)
        result = fit(built, folder, parts.REFERENCES, wish)
    except NonFiniteLoss as error:
        kept = checkpoints.latest(folder / "checkpoints")
        raise NonFiniteLoss(f"{error}; the last good checkpoint is {kept or 'none'}") from error
    if not leads:
        return 0  # Lightning would kill the others for any other code
    if result["stopped"]:
        images = f"{result['images']:,} of {budget:,} images"
        print(f"{folder}: stopped at {images}; the same command goes on", file=sys.stderr)
        return RESUMABLE
    report(folder, result["images"], result["rows"])
    return 0


def settle(experiment: Config, folder: Path, start: Path | None = None) -> None:
    """Make the run's folder with its config, or see that it is this experiment's.

    Args:
        experiment: what is to be trained.
        folder: the run's.
        start: the run or checkpoint whose weights it starts from, kept in `from`.

    Raises:
        ConfigError: the folder holds a run of another config; names the differing keys.
        ValueError: the folder cannot be written, or its run started elsewhere.
    """
    kept = folder / "config.yaml"
    begun = folder / "from"
    if start is not None:
        wanted = f"{runs.checkpoint_of(start)}\n"
        before = begun.read_text() if begun.exists() else "weights of its own\n"
        if kept.exists() and wanted != before:
            raise ValueError(f"{folder}: started from {before.strip()}, not from {wanted.strip()}")
        write_atomically(begun, lambda file: file.write(wanted.encode()))
    if kept.exists():
        changes = config.differences(config.load(kept).tree, experiment.tree)
        if changes:
            raise config.ConfigError(
                f"{folder} was begun with another config; name another folder (RUN=...) or undo:\n"
                + "\n".join(f"  {line}" for line in changes)
            )
    elif (folder / "checkpoints").exists():
        raise ValueError(
            f"{folder} holds checkpoints but no config.yaml; restore it or remove them"
        )
    else:
        write_atomically(kept, lambda file: file.write(config.dump(experiment).encode()))


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
        data=config.build(experiment, "data"),
        network=config.build(experiment, "network"),
        objective=objective,
        optimizer=config.build(experiment, "optimizer"),
        ema=config.build(experiment, "ema"),
        sampler=parts.sampler_of(experiment, objective),
        extractor=config.build(experiment, "features"),
        evaluation=config.build(experiment, "evaluation"),
        augment=config.build(experiment, "augment"),
    )


def start_from(experiment: Experiment, start: Path) -> None:
    """Fill the network with the averaged weights of another run; its own average starts there too.

    Args:
        experiment: built, its network not yet trained.
        start: a run's folder, or a checkpoint file.

    Raises:
        ValueError: names the first key that is missing, surplus or of another shape.
    """
    path = runs.checkpoint_of(start)
    loaded = checkpoints.load(path)
    checkpoints.load_weights(experiment.objective.denoiser(experiment.network), loaded, "ema", path)


def report(folder: Path, images: int, rows: list[dict[str, Any]]) -> None:
    """Say on stdout where the run lies, what was measured last and how to draw more."""
    print(f"run      {folder}  ({images:,} images)")
    for row in rows:
        print(f"measured {row['name']} = {row['value']:.4g}")
    grids = sorted((folder / "samples").glob("*.png"))
    if grids:
        print(f"samples  {grids[-1]}")
    print(f"more     make sample RUN={folder} COUNT=64")
