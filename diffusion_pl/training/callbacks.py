"""What happens beside the steps of a run: log rows, checkpoints, its stop; all by images."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.power_ema import save_snapshot
from diffusion_pl.training.progress import Progress
from diffusion_pl.training.settings import Settings
from diffusion_pl.training.stopping import Agreement, Wish


class Interval:
    """True once whenever the images seen pass another multiple of `every`.

    Args:
        every: images between two events.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.last = 0

    def start(self, images: int) -> None:
        """Begin counting at a position of the run."""
        self.last = images // self.every

    def passed(self, images: int) -> bool:
        """Whether a multiple of `every` lies between the last call and this one."""
        now = images // self.every
        passed, self.last = now > self.last, now
        return passed


class Log(Callback):
    """Writes loss, rate and speed to metrics.jsonl and the loggers, and moves the progress bar.

    Args:
        history: the run's metrics.jsonl.
        every: images between rows.
        progress: the bar; shown on rank 0.
    """

    def __init__(self, history: History, every: int, progress: Progress) -> None:
        self.history = history
        self.interval = Interval(every)
        self.progress = progress
        self.images = 0
        self.since = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.images = pl_module.images_seen
        self.interval.start(self.images)
        if trainer.is_global_zero:
            self.history.rewind(self.images)
            self.progress.start(self.images)
        self.since = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        images = pl_module.images_seen
        if trainer.is_global_zero:
            self.progress.advance(images)
        if self.interval.passed(images):
            self._row(trainer, pl_module, images)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if pl_module.images_seen > self.images and trainer.global_step >= trainer.max_steps:
            self._row(trainer, pl_module, pl_module.images_seen)

    def _row(self, trainer: lightning.Trainer, pl_module: DiffusionModule, images: int) -> None:
        loss = pl_module.read_loss()
        loss = float(trainer.strategy.reduce(torch.tensor(loss, device=pl_module.device)))
        seconds = time.monotonic() - self.since
        row = {
            "images": images,
            "step": trainer.global_step,
            "loss": loss,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "images_per_second": round((images - self.images) / seconds, 2),
        }
        self.images, self.since = images, time.monotonic()
        if trainer.is_global_zero:
            self.history.append(row)
            self.progress.measure(loss=loss)
        log(trainer, row, images)

    def pause(self, seconds: float) -> None:
        """Leave time that was not training out of the speed."""
        self.since += seconds


def log(trainer: lightning.Trainer, row: Mapping[str, Any], images: int) -> None:
    """Hand the numbers of a row to TensorBoard or W&B, with the images seen as the axis."""
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=images)


class Checkpoints(Callback):
    """Saves the run every so many images and at its end, and keeps the newest few.

    Args:
        folder: where the checkpoints lie.
        settings: how often, and which stay.
        config: the resolved config, written into each.
    """

    def __init__(self, folder: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.interval = Interval(settings.checkpoint_every)
        self.keep = settings.keep
        self.keep_every = settings.keep_every
        self.config = config
        self.saved = -1

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[checkpoints.SECTION] = {
            "format": checkpoints.FORMAT,
            "config": dict(self.config),
            "images": pl_module.images_seen,
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

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        # After the last evaluation: a run with its last checkpoint has all its measurements.
        if 0 <= self.saved < pl_module.images_seen:
            self._save(trainer, pl_module)

    def _save(self, trainer: lightning.Trainer, pl_module: DiffusionModule) -> None:
        images = pl_module.images_seen
        path = self.folder / f"{images:012d}.ckpt"
        trainer.save_checkpoint(path)
        self.saved = images
        if trainer.is_global_zero:
            checkpoints.point_to(path)
            for old in checkpoints.found(self.folder)[: -self.keep]:
                # The first one past each multiple stays for good.
                passed = int(old.stem) % self.keep_every if self.keep_every else math.inf
                if passed >= pl_module.batch_size:
                    old.unlink()


class Snapshots(Callback):
    """Writes the averages that others are made of afterwards, every so many images and at the end.

    Args:
        folder: where they lie.
        every: images between two.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder = folder
        self.interval = Interval(every)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.interval.start(pl_module.images_seen)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        images = pl_module.images_seen
        last = trainer.global_step >= trainer.max_steps
        if (self.interval.passed(images) or last) and trainer.is_global_zero:
            save_snapshot(self.folder, images, pl_module.profiles)


class Stop(Callback):
    """Ends the training between two steps when any rank was told to stop.

    Args:
        wish: this process's.
    """

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.stopped = False
        self.agreement: Agreement | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.wish.listen()  # Lightning has taken some of them for itself
        self.agreement = Agreement(self.wish, pl_module.device)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.agreement is not None
        if trainer.global_step < trainer.max_steps and self.agreement.reached():
            self.stopped = trainer.should_stop = True
