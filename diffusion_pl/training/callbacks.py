"""Callbacks of a run, at intervals in images: log, checkpoints, snapshots, time limits, stop."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from diffusion_pl import ranks
from diffusion_pl.diffusion.conditions import sizes
from diffusion_pl.evaluation.prompts import TextEncoder
from diffusion_pl.evaluation.provenance import now
from diffusion_pl.progress import Progress
from diffusion_pl.signals import StopRequest
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import flops, power_ema, sharding
from diffusion_pl.training.beginning import Begin
from diffusion_pl.training.history import History
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.sanity import Spikes
from diffusion_pl.training.settings import TrainerConfig
from diffusion_pl.training.stopping import Agreement
from diffusion_pl.training.watchdog import Watchdog


class Interval:
    """True once whenever the images seen pass a multiple of `every`."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.last = 0

    def start(self, images: int) -> None:
        """Start counting at `images` seen."""
        self.last = images // self.every

    def passed(self, images: int) -> bool:
        """Whether a multiple of `every` was passed since the last call."""
        now = images // self.every
        passed, self.last = now > self.last, now
        return passed


class DataWait(Callback):
    """Counts the time that steps wait for their batch; a run's last callback."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.ended = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.ended = time.monotonic()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.monotonic() - self.ended

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ended = time.monotonic()

    def take(self) -> float:
        """Seconds since the last call."""
        taken, self.seconds = self.seconds, 0.0
        return taken


class Log(Callback):
    """Logs loss, learning rate, speed, memory and more to metrics.jsonl and the loggers, and to
    the view.

    Args:
        history: the run's metrics.jsonl.
        every: images between rows.
        progress: shown on rank 0.
        check: raises if the run is no longer this process's to write to.
        waits: of the run's first rank.
    """

    def __init__(
        self,
        history: History,
        every: int,
        progress: Progress,
        check: Callable[[], None],
        waits: DataWait,
    ) -> None:
        self.history = history
        self.interval = Interval(every)
        self.progress = progress
        self.check = check
        self.waits = waits
        self.images = 0
        self.since = 0.0
        self.utilization: float | None = None  # of the peak, by an image a second
        self.spikes = Spikes()
        self.scale: float | None = None  # of fp16's loss

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.images = pl_module.images_seen
        self.interval.start(self.images)
        if trainer.is_global_zero:
            self.history.rewind(self.images)
            self.progress.note(*self.history.rows())
            self.progress.start(self.images)
            self.utilization = flops.utilization(trainer, pl_module)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scale = None if scaler is None else scaler.get_scale()
        self.since = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        images = pl_module.images_seen
        if trainer.is_global_zero:
            self.progress.advance(images, outputs["loss"])
        if self.interval.passed(images):
            self._row(trainer, pl_module, images)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if pl_module.images_seen > self.images and trainer.global_step >= trainer.max_steps:
            self._row(trainer, pl_module, pl_module.images_seen)

    def _row(self, trainer: lightning.Trainer, pl_module: DiffusionModule, images: int) -> None:
        means = pl_module.totals.read()
        seconds = time.monotonic() - self.since
        speed = (images - self.images) / seconds
        row = {
            "images": images,
            "step": trainer.global_step,
            **means,
            "learning_rate": pl_module.learning_rate,
            "images_per_second": round(speed, 2),
            "data_wait": round(min(self.waits.take() / seconds, 1.0), 4),
            "memory_gb": round(peak_memory(trainer.strategy.root_device) / 1e9, 3),
            **({} if self.utilization is None else {"mfu": round(speed * self.utilization, 4)}),
            **self._scale(trainer, images),
            "time": now(),
        }
        self.images, self.since = images, time.monotonic()
        if trainer.is_global_zero:
            self.check()
            self.history.append(row)
            self.progress.note(row)
            if spike := self.spikes.note(means["loss"]):
                self.progress.say(f"{images:,} images: {spike}")
        log(trainer, row, images)

    def _scale(self, trainer: lightning.Trainer, images: int) -> dict[str, float]:
        """fp16's loss scale; a smaller one than before means that steps were skipped."""
        if self.scale is None:
            return {}
        before, self.scale = self.scale, trainer.precision_plugin.scaler.get_scale()  # type: ignore[attr-defined]
        if trainer.is_global_zero and self.scale < before:
            self.progress.say(
                f"{images:,} images: fp16 left out steps whose gradient overflowed; the scale of "
                f"its loss went from {before:.4g} to {self.scale:.4g}"
            )
        return {"loss_scale": self.scale}

    def pause(self, seconds: float) -> None:
        """Exclude time that was not training from the speed."""
        self.since += seconds


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has had at a time: of a GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # elsewhere in KiB


def log(trainer: lightning.Trainer, row: Mapping[str, Any], images: int) -> None:
    """Pass the numbers of a row to the loggers, with the images seen as step."""
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=images)


class Checkpoints(Callback):
    """Saves checkpoints at intervals and at the end, and prunes old ones.

    Args:
        folder: of the checkpoints.
        settings: `checkpoint_every`, `keep` and `keep_every`.
        config: the resolved config, written into each.
        begin: has the digests of data and code, written into each.
    """

    def __init__(
        self, folder: Path, settings: TrainerConfig, config: Mapping[str, Any], begin: Begin
    ) -> None:
        self.folder = folder
        self.interval = Interval(settings.checkpoint_every)
        self.keep = settings.keep
        self.keep_every = settings.keep_every
        self.config = config
        self.begin = begin
        self.saved = -1

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[checkpoints.SECTION] = {
            "format": checkpoints.FORMAT,
            "config": dict(self.config),
            "images": pl_module.images_seen,
            **self.begin.about(),
        }

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.interval.start(pl_module.images_seen)
        self.saved = pl_module.images_seen

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        images = pl_module.images_seen
        if self.interval.passed(images) and trainer.global_step < trainer.max_steps:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        # Before the last evaluation, which is repeated on resume if it was stopped.
        if self.saved < pl_module.images_seen:
            self._save(trainer, pl_module)

    def _save(self, trainer: lightning.Trainer, pl_module: DiffusionModule) -> None:
        images = pl_module.images_seen
        path = self.folder / checkpoints.name_of(images)
        self.begin.start.check()
        trainer.save_checkpoint(path)
        self.saved = images
        if trainer.is_global_zero:
            checkpoints.point_to(path)
            checkpoints.prune(
                self.folder, images, self.keep, lambda old: self._stays(old, pl_module.batch_size)
            )

    def _stays(self, images: int, batch_size: int) -> bool:
        """Whether this is the first checkpoint past a multiple of `keep_every`."""
        return self.keep_every is not None and images % self.keep_every < batch_size


class Vocabulary(Callback):
    """Writes into the checkpoints what words need: class names for `--label NAME`, and which
    encoder the captions have for `--prompt`."""

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        images = trainer.datamodule.opened()  # type: ignore[attr-defined]
        taken = sizes(pl_module.denoiser.network)
        if images.class_names and taken["label"]:
            checkpoint[checkpoints.CLASS_NAMES] = list(images.class_names)
        if taken["text"]:
            checkpoint[checkpoints.TEXT_ENCODER] = asdict(TextEncoder.of(images.texts))


class Snapshots(Callback):
    """Writes snapshots of the power-function averages at intervals and at the end.

    If the one of the checkpoint that a run resumes from is damaged or lost, it is written again.

    Args:
        folder: of the snapshots.
        every: images between two.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder = folder
        self.interval = Interval(every)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        images = pl_module.images_seen
        self.interval.start(images)
        if trainer.is_global_zero:
            power_ema.set_damaged_aside(self.folder)
        due = images and images % self.interval.every < pl_module.batch_size
        there = power_ema.snapshot_of(self.folder, images).exists()
        if due and not trainer.strategy.broadcast(there):
            self._save(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = trainer.global_step >= trainer.max_steps
        if self.interval.passed(pl_module.images_seen) or last:
            self._save(trainer, pl_module)

    def _save(self, trainer: lightning.Trainer, pl_module: DiffusionModule) -> None:
        averages = [sharding.saved(average.state_dict()) for average in pl_module.profiles]
        if trainer.is_global_zero:
            power_ema.save_snapshot(self.folder, pl_module.images_seen, averages)


class TimeLimits(Callback):
    """Aborts a hung run: patient until its first step is made, strict from then on.

    Args:
        settings: the limits; see `start_timeout`, `timeout` and `watchdog`.
    """

    def __init__(self, settings: TrainerConfig) -> None:
        self.settings = settings
        self.watchdog = Watchdog(settings.start_timeout)
        self.begun = False

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        # Every forward pass counts: a step may have many, an evaluation thousands.
        for denoiser in (pl_module.denoiser, pl_module.ema):
            denoiser.register_forward_pre_hook(self._note_pass)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.watchdog.alive()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.begin()  # what takes longer, such as compiling, is done

    def begin(self) -> None:
        """Be strict from now on; safe to call again."""
        if not self.begun:
            self.begun = True
            ranks.wait_at_most(self.settings.timeout)
            self.watchdog.stop()
            self.watchdog.limit = self.settings.watchdog
            self.watchdog.alive()

    def _note_pass(self, module: Any, inputs: Any) -> None:
        self.watchdog.alive()


class Stop(Callback):
    """Ends the training between two steps once any rank has a request to stop."""

    def __init__(self, stop_request: StopRequest) -> None:
        self.stop_request = stop_request
        self.stopped = False
        self.agreement: Agreement | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        self.agreement = Agreement(self.stop_request, trainer.strategy.root_device)

    def wanted(self) -> bool:
        """Whether any rank has a request to stop; every rank calls it."""
        assert self.agreement is not None
        return self.agreement.asked()

    def end(self, trainer: lightning.Trainer) -> None:
        self.stopped = trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.agreement is not None
        if trainer.global_step < trainer.max_steps and self.agreement.reached():
            self.end(trainer)
