"""A training run: from built parts to a finished run folder, starting or resuming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import nn

from diffusion_pl.data.dataset import DatasetSpec
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.diffusion.objective import TrainingObjective
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation, Sampler
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.progress import Progress
from diffusion_pl.signals import StopRequest
from diffusion_pl.training import adapter, power_ema
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.beginning import Begin, Start
from diffusion_pl.training.callbacks import (
    Checkpoints,
    DataWait,
    Log,
    Snapshots,
    Stop,
    TimeLimits,
    Vocabulary,
)
from diffusion_pl.training.compiling import compile_network
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.evaluating import Evaluate, is_evaluated
from diffusion_pl.training.held_out import HeldOutLosses
from diffusion_pl.training.history import History, is_evaluation
from diffusion_pl.training.loggers import Described, make_loggers
from diffusion_pl.training.lr_schedule import LRSchedule
from diffusion_pl.training.module import Augment, DiffusionModule
from diffusion_pl.training.optimizers import MakeOptimizer
from diffusion_pl.training.run_data import RunData
from diffusion_pl.training.settings import (
    AUTOCAST,
    TrainerConfig,
    check_augment,
    resolve_precision,
)
from diffusion_pl.training.strategy import cluster, make_strategy


@dataclass(frozen=True)
class Experiment:
    """All parts of a run, built.

    Args:
        name: of the experiment.
        config: resolved, plain containers; kept in the checkpoints.
        seed: of all random numbers in training.
        held_out: images for `evaluation.losses`; None: the data set's own.

    Raises:
        UserError: a callback or a logger that is none of Lightning's, or an augmentation whose
            label the network does not take.
    """

    name: str
    config: Mapping[str, Any]
    seed: int
    settings: TrainerConfig
    data: DataConfig
    network: nn.Module
    objective: TrainingObjective
    optimizer: MakeOptimizer
    ema: EMA
    sampler: Sampler
    extractor: Extractor
    evaluation: Evaluation
    augment: Augment | None = None
    lr_schedule: LRSchedule | None = None
    callbacks: Sequence[Callback] = ()
    loggers: Sequence[Logger] = ()
    held_out: DatasetSpec | None = None

    def __post_init__(self) -> None:
        for key, kind in {"callbacks": Callback, "loggers": Logger}.items():
            for number, each in enumerate(getattr(self, key)):
                if not isinstance(each, kind):
                    raise UserError(
                        f"{key}[{number}]: must be a {kind.__name__} of Lightning's (got one of "
                        f"type {type(each).__name__}); give a node with the class as `_target_`, "
                        "without `_partial_`"
                    )
        check_augment(self.augment, self.network)


def fit(
    experiment: Experiment,
    run: Path,
    references: Path,
    stop_request: StopRequest,
    start: Start | None = None,
) -> dict[str, Any]:
    """Train to the end of the budget, from the run's last checkpoint if there is one.

    Args:
        experiment: the parts.
        run: the run's folder; created if absent.
        references: folder of reference statistics.
        stop_request: once set, the run saves a checkpoint and ends between two steps, and marks
            its folder as waiting to be resumed.
        start: how the run starts or resumes; by default from its last checkpoint.

    Returns:
        {"images": images seen, "rows": the last metrics, "stopped": whether it was stopped}.

    Raises:
        UserError: parts that do not fit one another, ranks that differ, data that is not the
            run's, or a folder that cannot be written.
        LockLostError: another process has taken the run over.
        NonFiniteError: names the step, its images and their noise levels.
        StopError: stopped before the first step.
    """
    settings, batch_size = experiment.settings, experiment.data.batch_size
    settings.check_objective(experiment.objective)
    data = RunData(
        experiment.data, settings, experiment.network, experiment.seed, stop_request.wait_for_steps
    )
    with adapter.quiet_lightning():
        precision = resolve_precision(settings.precision, settings.device_type())
        trainer = make_trainer(experiment, run, precision)
        settings.per_device_batch(batch_size, trainer.world_size)  # refused before any work
        module = make_module(experiment)
        history = History(run / "metrics.jsonl")
        progress = Progress(
            trainer.max_steps * batch_size, name=run.name, every=experiment.evaluation.every
        )
        folder = run / "checkpoints"
        start = start or Start(checkpoints.latest(folder))
        waits = DataWait()
        log = Log(history, settings.log_every, progress, start.check, waits)
        begin = Begin(run, start, experiment.config, progress)
        stop, limits = Stop(stop_request), TimeLimits(settings)
        evaluation = _evaluation(experiment, run, references, precision, log, stop)
        trainer.callbacks += [  # type: ignore[attr-defined]
            begin,
            *_snapshots(experiment, run),
            Vocabulary(),
            *experiment.callbacks,
            Described(experiment.config),
            stop,
            limits,
            log,
            *_held_out(experiment, AUTOCAST[precision], history, log),
            Checkpoints(folder, settings, experiment.config, begin),
            evaluation,
            waits,
        ]
        try:
            trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint)
            if not stop.stopped:
                done = is_evaluated(run, experiment.evaluation, module.images_seen)
                # Rank 0 decides: others may not see yet what it wrote.
                if not trainer.strategy.broadcast(done):
                    limits.begin()  # no step has been made
                    evaluation.make_up(trainer, module)
        finally:
            limits.watchdog.stop()
            progress.stop()
    if stop.stopped:
        if trainer.is_global_zero:
            stop_request.mark(run)
        trainer.strategy.barrier()  # srun ends all ranks with the first that leaves
    rows = last_measurements(history)
    return {"images": module.images_seen, "rows": rows, "stopped": stop.stopped}


def _evaluation(
    experiment: Experiment, run: Path, references: Path, precision: str, log: Log, stop: Stop
) -> Evaluate:
    """What evaluates the averaged weights."""
    return Evaluate(
        experiment.evaluation,
        experiment.sampler,
        experiment.extractor,
        origin={"weights": "ema", "ema": described(experiment.ema)},
        references=references,
        precision=AUTOCAST[precision],
        run=run,
        history=log.history,
        training_log=log,
        stop=stop,
        config=experiment.config,
        best=experiment.settings.best(run),
    )


def _snapshots(experiment: Experiment, run: Path) -> list[Callback]:
    """Before the checkpoint of the same step, which then always has its snapshot."""
    every = experiment.ema.posthoc_every
    return [Snapshots(run / power_ema.FOLDER, every)] if every else []


def _held_out(
    experiment: Experiment, precision: torch.dtype | None, history: History, log: Log
) -> list[Callback]:
    """What measures the held-out loss, if it is wanted."""
    if experiment.evaluation.losses is None:
        return []
    losses = HeldOutLosses(
        experiment.evaluation,
        experiment.held_out,
        precision=precision,
        ema=described(experiment.ema),
        history=history,
        training_log=log,
    )
    return [losses]


def make_trainer(experiment: Experiment, run: Path, precision: str) -> lightning.Trainer:
    """Lightning's Trainer without its loops and files that this package replaces.

    Raises:
        UserError: settings that do not fit one another.
    """
    settings = experiment.settings
    on_cpu = settings.device_type() == "cpu"
    precision_plugin = adapter.precision_plugin(precision, settings)
    with adapter.in_a_line():
        made = lightning.Trainer(
            accelerator=settings.accelerator,
            devices=1 if on_cpu and settings.devices == "auto" else settings.devices,
            num_nodes=settings.nodes,
            strategy=make_strategy(settings),
            max_steps=settings.steps(experiment.data.batch_size),
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=2**31,  # `Log` logs, by images
            logger=make_loggers(settings, experiment.config, run, experiment.loggers),
            profiler=adapter.profiler(settings, run),
            plugins=[adapter.CheckpointFiles(), precision_plugin, *cluster(settings)],
            default_root_dir=run,
            benchmark=True,
        )
    if made.world_size != (ranks := settings.world_size()):
        name = type(made.strategy).__name__
        raise UserError(f"trainer.strategy: {name} has {made.world_size} devices, not {ranks}")
    return made


def make_module(experiment: Experiment) -> DiffusionModule:
    """The LightningModule of an experiment, compiled if set so."""
    settings = experiment.settings
    experiment.network.to(memory_format=torch.channels_last)
    module = DiffusionModule(
        experiment.network,
        experiment.objective,
        experiment.optimizer,
        experiment.ema,
        settings,
        batch_size=experiment.data.batch_size,
        resolution=experiment.data.dataset.resolution,
        augment=experiment.augment,
        degradation=experiment.data.image,
        lr_schedule=experiment.lr_schedule,
        seed=experiment.seed,
    )
    settings.check_objective(module.objective)  # with the weights that it has for the network
    for denoiser in (module.denoiser, module.ema):
        compile_network(denoiser.network, settings.compile)
    return module


def last_measurements(history: History) -> list[dict[str, Any]]:
    """The rows of the newest evaluation."""
    rows = [row for row in history.rows() if is_evaluation(row)]
    return [row for row in rows if row["images"] == rows[-1]["images"]]
