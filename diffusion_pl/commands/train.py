"""`train`: train an experiment; the same command again resumes its run."""

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
from diffusion_pl.commands import data_sets, hints, parts, run_dir, starting, trust
from diffusion_pl.commands.options import TrainOptions
from diffusion_pl.commands.results import Result, line
from diffusion_pl.config import Config
from diffusion_pl.data.dataset import DatasetSpec
from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.data.readers import ReaderLostError
from diffusion_pl.data.shard_workers import WorkerLost
from diffusion_pl.data.shards import Shards
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import sweep, write_atomically
from diffusion_pl.names import shown
from diffusion_pl.signals import FAILED, MARKER, RESUMABLE, StopRequest
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

NOTHING = Result({}, [])  # of later ranks, or a run that was stopped


def command(
    experiment: str,
    /,
    *overrides: str,
    run: Path | None = None,
    options: TrainOptions = TrainOptions(),
    stop_request: Annotated[StopRequest | None, Parameter(parse=False)] = None,
) -> Result:
    """Train an experiment, or resume its run.

    Example: diffusion_pl train cifar10_edm optimizer.lr=1e-4 --run runs/mine

    Args:
        experiment: a name, or a YAML file anywhere.
        overrides: KEY=VALUE over it, such as optimizer.lr=1e-4.
        run: the run's folder; runs/EXPERIMENT when not given.
        stop_request: set by signals.
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
    """Train an experiment in a run's folder.

    Args:
        experiment: bound.
        folder: the run's.
        stop_request: set by signals.
        options: of the command.
        further: callbacks and loggers of Lightning beside those of the config.

    Returns:
        The run, its metrics and the exit code.
    """
    trust.check_training(experiment)
    if missing := parts.missing_weights(config.build(experiment, "objective")):
        raise experiment.error("objective", missing)
    settings: TrainerConfig = config.build(experiment, "trainer")
    run_dir.check_name(folder)
    check_ranks(settings)
    weights = None
    if not options.start and (options.fresh_labels or options.accept_differences):
        raise UserError("--fresh-labels, --accept-differences: each needs --from RUN")
    leads = leads_run(settings)
    if options.start and not checkpoints.found(folder / "checkpoints"):
        # Refused before the folder is made.
        weights = starting.load_weights(options.start, experiment, options, leads)
    if not leads:  # only the first rank writes
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
    """Begin or resume a run.

    Args:
        experiment: of the run.
        settings: of its trainer.
        folder: the run's.
        weights: that a new run starts from; None: initialised.
        lock: on the folder, on the first rank; None on later ranks.
        stop_request: set by signals.
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
            f"{folder}: holds imported weights, not a run to resume; fine-tune them in another "
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
        encoder=None if weights is None else weights.encoder,
        data_changed=options.data_changed,
        lock=lock,
        keep=lambda images: run_dir.record(experiment, folder, options.start, images, changes),
    )
    result = _fit(built, folder, stop_request, start)
    if not result["stopped"]:
        if not leads:
            return NOTHING
        (folder / MARKER).unlink(missing_ok=True)
        return report(folder, result["images"], result["rows"])
    if leads:
        images = f"{result['images']:,} of {budget:,} images"
        rest = "goes on"
        if result["images"] >= budget:
            rest = "makes its last evaluation, which is all that is left"
        print(shown(f"{folder}: stopped at {images}; the same command {rest}"), file=sys.stderr)
    # Lightning kills all ranks when one that it started ends with another code than 0.
    return dataclasses.replace(NOTHING, code=0 if ranks.is_started_by_lightning() else RESUMABLE)


def _fit(
    built: Experiment, folder: Path, stop_request: StopRequest, start: Start
) -> dict[str, Any]:
    """Train; record a failure that would recur in the file FAILED."""
    try:
        if start.lock is not None:
            for name in (MARKER, FAILED):
                (folder / name).unlink(missing_ok=True)
        return fit(built, folder, parts.REFERENCES, stop_request, start)
    except NonFiniteError as error:
        kept = checkpoints.latest(folder / "checkpoints")
        failed = NonFiniteError(
            error.step,
            f"{error}; the last good checkpoint is {kept or 'none'}; to inspect the step: "
            f"python -m diffusion_pl replay {shlex.quote(str(folder))} --step {error.step}",
        )
        write_atomically(folder / FAILED, lambda file: file.write(f"{failed}\n".encode()))
        raise failed from error


def leads_run(settings: TrainerConfig) -> bool:
    """Whether this is the first rank, the one that writes.

    It is in a run of one process, whatever ranks a job's environment names.
    """
    return settings.world_size() == 1 or ranks.leads_run()


def check_ranks(settings: TrainerConfig) -> None:
    """Check that the environment has what the run's ranks need to find each other.

    Raises:
        UserError: it does not, or it names other ranks.
    """
    devices = settings.devices_per_node()
    by = starter(os.environ, settings.nodes, devices)
    if settings.nodes * devices > 1:
        check_address(os.environ, by, ranks.leads_run(), settings.nodes)


def check_data_folder(source: DatasetSpec) -> None:
    """Check that the data exists, before ranks are started and networks are built.

    Raises:
        UserError: it does not, or is no prepared data set.
    """
    folder = parts.data_folder(source)
    if isinstance(source, Shards) and folder is not None and source.made_of is None:
        source.prepare()  # reads its manifest alone
    elif isinstance(source, ImageFolder) and not (folder is None or folder.exists()):
        source.listing()


def build(
    experiment: Config, callbacks: Sequence[Any] = (), loggers: Sequence[Any] = ()
) -> Experiment:
    """Build every part of an experiment, the weights initialised from its seed.

    Args:
        experiment: bound.
        callbacks: of Lightning, after those of the config.
        loggers: of Lightning, likewise.
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
        held_out=held_out_of(experiment),
        callbacks=(*_listed(experiment, "callbacks"), *callbacks),
        loggers=(*_listed(experiment, "loggers"), *loggers),
    )


def held_out_of(experiment: Config) -> DatasetSpec | None:
    """The images that `evaluation.losses.data` names; None where it names none.

    Raises:
        UserError: there are none.
    """
    named = trust.held_out_of(experiment)
    if named is None:
        return None
    network = experiment.get("network")
    text = "auto" if network.get("text_width") else None
    side = trust.data_of(experiment).dataset.resolution
    try:
        found = data_sets.source_of(named, side, text=text)
    except UserError as error:
        raise experiment.error("evaluation.losses.data", str(error)) from error
    if isinstance(found, ImageFolder) and network.get("classes"):
        return dataclasses.replace(found, labels=True)
    return found


def _listed(experiment: Config, section: str) -> list[Any]:
    """The objects of an optional section."""
    return config.build(experiment, section) if experiment.tree.get(section) else []


def report(folder: Path, images: int, rows: list[dict[str, Any]]) -> Result:
    """The run's folder, its last metrics, and the command that samples from it."""
    lines = [line("run", f"{folder}  ({images:,} images)")]
    lines += [line("measured", f"{row['name']} = {row['value']:.4g}") for row in rows]
    grids = sorted((folder / "samples").glob("*.png"))
    if grids:
        lines.append(line("samples", grids[-1]))
    if names := class_names(folder):
        lines.append(line("classes", hints.classes(names)))
    lines.append(line("next", hints.sample(folder)))
    return Result({"run": str(folder), "images": images, "measures": rows}, lines, in_pipes=True)
