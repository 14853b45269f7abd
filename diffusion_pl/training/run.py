"""One training run: from built parts to a finished run folder, or on from where it stopped."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from torch import nn

from diffusion_pl.data.loader import DataConfig
from diffusion_pl.diffusion.objective import TrainingObjective
from diffusion_pl.evaluation import Evaluation, Sampler
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.signals import Wish
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import power_ema
from diffusion_pl.training.beginning import Begin, Start
from diffusion_pl.training.bounded import Bounded
from diffusion_pl.training.callbacks import Checkpoints, ClassNames, Log, Snapshots, Stop
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.evaluating import Evaluate, is_evaluated
from diffusion_pl.training.history import History
from diffusion_pl.training.loggers import Described, make_loggers
from diffusion_pl.training.lr_schedule import LRSchedule
from diffusion_pl.training.module import Augment, DiffusionModule
from diffusion_pl.training.opening import Network
from diffusion_pl.training.optimizers import MakeOptimizer
from diffusion_pl.training.progress import Progress
from diffusion_pl.training.run_data import RunData
from diffusion_pl.training.settings import (
    AUTOCAST,
    Settings,
    resolve_precision,
)
from diffusion_pl.training.strategy import cluster, make_strategy


@dataclass(frozen=True)
class Experiment:
    """Everything that a run is made of, built.

    Args:
        name: of the experiment.
        config: the resolved config, plain containers, kept in the checkpoints.
        seed: of everything random in training.
    """

    name: str
    config: Mapping[str, Any]
    seed: int
    settings: Settings
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


class CheckpointFiles(CheckpointIO):
    """Lightning's way to the disk, through our atomic writer and our careful reader."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        checkpoints.save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return checkpoints.load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink()


def fit(
    experiment: Experiment, run: Path, references: Path, wish: Wish, start: Start | None = None
) -> dict[str, Any]:
    """Train to the end of the budget, from the run's last checkpoint if there is one.

    Args:
        experiment: the parts.
        run: the run's folder; made if absent.
        references: where statistics of real images are kept.
        wish: whether this process was told to stop; the run then ends between two steps, with a
            checkpoint and after it the marker that it waits to go on.
        start: how the run begins or goes on; from its last checkpoint when not given.

    Returns:
        {"images": images seen, "rows": the last measurements, "stopped": whether it was}.

    Raises:
        UserError: parts that do not fit one another, ranks that differ, data that is not the
            run's, or a folder that cannot be written.
        LostLock: another process has taken the run over.
        NonFinite: names the step, its images and their noise levels.
        Stopped: told so before the first step.
    """
    settings, batch_size = experiment.settings, experiment.data.batch_size
    settings.check_objective(experiment.objective)
    data = RunData(
        experiment.data, settings, experiment.network, experiment.seed, wish.wait_for_steps
    )
    with quiet_lightning():
        precision = resolve_precision(settings.precision, settings.device_type())
        trainer = make_trainer(experiment, run, precision)
        settings.share_size(batch_size, trainer.world_size)  # or one line, before any work
        module = make_module(experiment)
        history = History(run / "metrics.jsonl")
        progress = Progress(trainer.max_steps * batch_size)
        folder = run / "checkpoints"
        start = start or Start(checkpoints.latest(folder))
        log = Log(history, settings.log_every, progress, start.check)
        begin = Begin(run, start, experiment.config, progress)
        trainer.callbacks.append(begin)  # type: ignore[attr-defined]
        if experiment.ema.posthoc_every:
            # Before the checkpoint of the same moment, which then never lacks its snapshot.
            snapshots = Snapshots(run / power_ema.FOLDER, experiment.ema.posthoc_every)
            trainer.callbacks.append(snapshots)  # type: ignore[attr-defined]
        trainer.callbacks.append(ClassNames())  # type: ignore[attr-defined]
        stop, bounded = Stop(wish), Bounded(settings)
        trainer.callbacks.extend(experiment.callbacks)  # type: ignore[attr-defined]
        evaluation = Evaluate(
            experiment.evaluation,
            experiment.sampler,
            experiment.extractor,
            origin={"weights": "ema", "ema": described(experiment.ema)},
            references=references,
            precision=AUTOCAST[precision],
            run=run,
            history=history,
            training_log=log,
            stop=stop,
            best=settings.best(run),
        )
        saving = Checkpoints(folder, settings, experiment.config, begin)
        last = [Described(experiment.config), stop, bounded, log, saving, evaluation]
        trainer.callbacks.extend(last)  # type: ignore[attr-defined]
        try:
            trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint)
            if not stop.stopped:
                done = is_evaluated(run, experiment.evaluation, module.images_seen)
                # The first rank wrote it: the others may look too early.
                if not trainer.strategy.broadcast(done):
                    bounded.begin()  # no step has been made
                    evaluation.make_up(trainer, module)
        finally:
            bounded.watchdog.stop()
            progress.stop()
    if stop.stopped and trainer.is_global_zero:
        wish.mark(run)
    if stop.stopped:  # srun ends the others when the first has left: not before the mark is there
        trainer.strategy.barrier()
    return {
        "images": module.images_seen,
        "rows": last_measurements(history),
        "stopped": stop.stopped,
    }


def make_trainer(experiment: Experiment, run: Path, precision: str) -> lightning.Trainer:
    """Lightning's Trainer with everything of its own that we replace switched off."""
    settings = experiment.settings
    on_cpu = settings.device_type() == "cpu"
    return lightning.Trainer(
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
        log_every_n_steps=2**31,  # rows are ours, by images
        logger=make_loggers(settings, experiment.config, run, experiment.loggers),
        profiler=Unprofiled(),
        plugins=[CheckpointFiles(), precision_plugin(precision, settings), *cluster(settings)],
        default_root_dir=run,
        benchmark=True,
    )


class Unprofiled(PassThroughProfiler):
    """No profiler, at no cost: Lightning asks it some seventy times a step, 0.1 ms in all."""

    def profile(self, action_name: str) -> contextlib.nullcontext[str]:  # type: ignore[override]
        """A context that does nothing."""
        return _NOTHING


_NOTHING = contextlib.nullcontext("")


def precision_plugin(precision: str, settings: Settings) -> Precision:
    """How a run computes; said outright, since on a CPU Lightning takes bf16 for fp16."""
    device = settings.device_type()
    if precision == "fp32":
        return Precision()
    if precision == "bf16":
        return MixedPrecision("bf16-mixed", device)
    return MixedPrecision("16-mixed", device, torch.amp.GradScaler(device))


def make_module(experiment: Experiment) -> DiffusionModule:
    """The LightningModule of an experiment, compiled if so set."""
    settings = experiment.settings
    network = cast(Network, experiment.network)
    experiment.network.to(memory_format=torch.channels_last)
    module = DiffusionModule(
        experiment.network,
        experiment.objective,
        experiment.optimizer,
        experiment.ema,
        settings,
        batch_size=experiment.data.batch_size,
        resolution=experiment.data.dataset.resolution,
        classes=network.classes,
        augment=experiment.augment,
        lr_schedule=experiment.lr_schedule,
        seed=experiment.seed,
    )
    if settings.compile:
        module.denoiser.network.compile()
        module.ema.network.compile()
    return module


def last_measurements(history: History) -> list[dict[str, Any]]:
    """The rows of the newest evaluation."""
    rows = [row for row in history.rows() if "name" in row]
    return [row for row in rows if row["images"] == rows[-1]["images"]]


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's banners and hints about its own progress bar off the terminal."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Workers are our choice: images in memory are read fastest without.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # The average is a registered module that never trains, as we want it.
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
            # The loader starts where the run stands, by the images seen.
            warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")
            # A run shorter than the logging interval: rows are ours.
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
            # Lightning's own use of torch's trees.
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
