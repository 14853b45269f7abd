"""`train`: from an experiment's name to a finished run; the same command again goes on."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from diffusion_pl import config, locks, ranks
from diffusion_pl.commands import hints, parts, run_dir, starting, trust
from diffusion_pl.commands.options import TrainOptions
from diffusion_pl.commands.results import Result, line
from diffusion_pl.commands.run_dir import FAILED
from diffusion_pl.config import Config
from diffusion_pl.data.dataset import DatasetSpec
from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.data.readers import ReaderLostError
from diffusion_pl.data.shard_workers import WorkerLost
from diffusion_pl.data.shards import Shards
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import sweep, write_atomically
from diffusion_pl.names import shown
from diffusion_pl.signals import MARKER, RESUMABLE, StopRequest
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.beginning import Start, class_names
from diffusion_pl.training.evaluating import is_evaluated
from diffusion_pl.training.history import History
from diffusion_pl.training.meeting import RendezvousError, check_address, starter
from diffusion_pl.training.run import Experiment, fit, last_measurements
from diffusion_pl.training.sanity import NonFiniteError
from diffusion_pl.training.settings import TrainerConfig
from diffusion_pl.training.watchdog import end_with_parent

FAILURES: tuple[type[Exception], ...] = (
    NonFiniteError,
    WorkerLost,
    ReaderLostError,
    RendezvousError,
    locks.LockLostError,
)

NOTHING = Result({}, [])  # of a rank that does not lead, or a run that stopped


def command(
    experiment: str,
    /,
    *overrides: str,
    run: Path | None = None,
    options: TrainOptions = TrainOptions(),
    stop_request: Annotated[StopRequest | None, Parameter(parse=False)] = None,
) -> Result:
    """Train an experiment, or go on where it stopped.

    Example: diffusion_pl train cifar10_edm optimizer.lr=1e-4 --run runs/mine

    Args:
        experiment: a name, or a YAML file anywhere.
        overrides: KEY=VALUE over it, such as optimizer.lr=1e-4.
        run: the run's folder; runs/EXPERIMENT when not given.
        stop_request: whether the process was told to stop.
    """
    end_with_parent()
    read = parts.read(experiment, overrides, allow=options.allow, beside=options.start)
    return train(read, run or parts.RUNS / read.name, stop_request or StopRequest(), options)


def train(
    experiment: Config,
    folder: Path,
    stop_request: StopRequest,
    options: TrainOptions,
    **further: Any,
) -> Result:
    """Train an experiment that is read, in its folder.

    Args:
        experiment: bound.
        folder: the run's.
        stop_request: whether the process was told to stop.
        options: of the command.
        further: callbacks and loggers of Lightning that its config does not name.

    Returns:
        Where the run lies and what was measured, with the exit code.
    """
    trust.check_training(experiment)
    settings: TrainerConfig = config.build(experiment, "trainer")
    run_dir.check_name(folder)
    check_ranks(settings)
    weights = None
    if not options.start and (options.fresh_labels or options.accept_differences):
        raise UserError("--fresh-labels, --accept-differences: each belongs to --from RUN")
    leads = leads_run(settings)
    if options.start and not checkpoints.found(folder / "checkpoints"):
        # Refused before the folder is made.
        weights = starting.load_weights(options.start, experiment, options, leads)
    if not leads:  # the first rank writes for all of them
        return _train(experiment, settings, folder, weights, None, stop_request, options, further)
    with locks.hold(folder / locks.NAME, "training") as lock:
        sweep(folder)
        History(folder / "metrics.jsonl").mend()
        return _train(experiment, settings, folder, weights, lock, stop_request, options, further)


def _train(
    experiment: Config,
    settings: TrainerConfig,
    folder: Path,
    weights: starting.StartWeights | None,
    lock: locks.Lock | None,
    stop_request: StopRequest,
    options: TrainOptions,
    further: Mapping[str, Any],
) -> Result:
    """Go on with a run, or begin it.

    Args:
        experiment: what is trained.
        settings: its trainer's.
        folder: the run's.
        weights: that a new run starts from, None for its own.
        lock: on it, where this process is the run's first; None on the others, which the first one
            tells when they meet whether all is alike.
        stop_request: whether the process was told to stop.
        options: of the command.
        further: as for `train`.
    """
    leads = lock is not None
    latest = checkpoints.newest_sound(folder / "checkpoints", mend=leads)
    changes = run_dir.compare(experiment, folder, options.start, latest) if leads else []
    budget = settings.rounded_images(experiment.get("data.batch_size"))
    done = int(latest.stem) if latest else 0
    if done >= budget and is_evaluated(folder, config.build(experiment, "evaluation"), done):
        if not leads:
            return NOTHING
        (folder / MARKER).unlink(missing_ok=True)
        run_dir.record(experiment, folder, options.start, done, changes)
        print(f"{shown(str(folder))} is finished: {done:,} images", file=sys.stderr)
        return report(folder, done, last_measurements(History(folder / "metrics.jsonl")))
    if latest and not done:
        raise UserError(
            f"{folder}: holds imported weights, not a run to go on with; fine-tune them in another "
            f"folder: train {experiment.file} --from {folder} --run OTHER"
        )
    if latest and leads:
        for line in (*changes, f"going on from {done:,} of {budget:,} images"):
            print(shown(f"{folder}: {line}"), file=sys.stderr)
    if starter(os.environ, settings.nodes, settings.devices_per_node()) == "itself":
        check_data_folder(trust.data_of(experiment).dataset)
    built = build(experiment, **further)
    if weights is not None and not latest:
        weights.fill(built.objective.denoiser(built.network))
    start = Start(
        checkpoint=latest,
        origin=None if weights is None else weights.path,
        data_changed=options.data_changed,
        lock=lock,
        keep=lambda images: run_dir.record(experiment, folder, options.start, images, changes),
    )
    result = _fit(built, folder, stop_request, start)
    if not result["stopped"]:
        if not leads:
            return NOTHING
        (folder / MARKER).unlink(missing_ok=True)  # whoever left it
        return report(folder, result["images"], result["rows"])
    if leads:
        images = f"{result['images']:,} of {budget:,} images"
        print(shown(f"{folder}: stopped at {images}; the same command goes on"), file=sys.stderr)
    # Lightning would kill the others if one that it started ended with any other code.
    return dataclasses.replace(NOTHING, code=0 if ranks.is_started_by_lightning() else RESUMABLE)


def _fit(
    built: Experiment, folder: Path, stop_request: StopRequest, start: Start
) -> dict[str, Any]:
    """Train, and leave word of a failure that would come again."""
    try:
        if start.lock is not None:
            for name in (MARKER, FAILED):
                (folder / name).unlink(missing_ok=True)
        return fit(built, folder, parts.REFERENCES, stop_request, start)
    except NonFiniteError as error:
        kept = checkpoints.latest(folder / "checkpoints")
        failed = NonFiniteError(
            error.step,
            f"{error}; the last good checkpoint is {kept or 'none'}; to look at the step: "
            f"python -m diffusion_pl replay {shlex.quote(str(folder))} --step {error.step}",
        )
        write_atomically(folder / FAILED, lambda file: file.write(f"{failed}\n".encode()))
        raise failed from error


def leads_run(settings: TrainerConfig) -> bool:
    """Whether this process writes for all of its run's.

    A run of one process has no later rank, whatever an allocation has left in the environment.
    """
    return settings.nodes * settings.devices_per_node() == 1 or ranks.leads_run()


def check_ranks(settings: TrainerConfig) -> None:
    """See who started this process, and that its run's ranks can meet.

    Raises:
        UserError: they cannot, or the environment speaks of other ranks.
    """
    devices = settings.devices_per_node()
    by = starter(os.environ, settings.nodes, devices)
    if settings.nodes * devices > 1:
        check_address(os.environ, by, ranks.leads_run(), settings.nodes)


def check_data_folder(source: DatasetSpec) -> None:
    """See that the data's folder is there, before its ranks are started and networks built.

    Raises:
        UserError: it is not, or is no prepared set.
    """
    folder = parts.data_folder(source)
    if isinstance(source, Shards) and folder is not None and source.made_of is None:
        source.prepare()  # reads its manifest alone
    elif isinstance(source, ImageFolder) and not (folder is None or folder.exists()):
        source.listing()


def build(
    experiment: Config, callbacks: Sequence[Any] = (), loggers: Sequence[Any] = ()
) -> Experiment:
    """Build every part of an experiment.

    The weights are drawn from the experiment's seed, whatever was drawn before.

    Args:
        experiment: bound.
        callbacks: of Lightning, after those that the config names.
        loggers: of Lightning, the same.
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
        lr_schedule=parts.lr_schedule_of(experiment),
        ema=config.build(experiment, "ema"),
        sampler=parts.sampler_of(experiment, objective),
        extractor=trust.extractor_of(experiment),
        evaluation=config.build(experiment, "evaluation"),
        augment=config.build(experiment, "augment"),
        callbacks=(*_listed(experiment, "callbacks"), *callbacks),
        loggers=(*_listed(experiment, "loggers"), *loggers),
    )


def _listed(experiment: Config, section: str) -> list[Any]:
    """The objects of a section that an experiment may leave out."""
    return config.build(experiment, section) if experiment.tree.get(section) else []


def report(folder: Path, images: int, rows: list[dict[str, Any]]) -> Result:
    """Where the run lies, what was measured last and how to draw more."""
    lines = [line("run", f"{folder}  ({images:,} images)")]
    lines += [line("measured", f"{row['name']} = {row['value']:.4g}") for row in rows]
    grids = sorted((folder / "samples").glob("*.png"))
    if grids:
        lines.append(line("samples", grids[-1]))
    if names := class_names(folder):
        lines.append(line("classes", hints.classes(names)))
    lines.append(line("next", hints.sample(folder)))
    return Result({"run": str(folder), "images": images, "measures": rows}, lines, in_pipes=True)
