"""Draws and measures images of the averaged weights while a run trains."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from diffusion_pl.evaluation import Drawing, Evaluation, Sampler, evaluate, reference_of
from diffusion_pl.evaluation.cost import estimate
from diffusion_pl.evaluation.measuring import build
from diffusion_pl.images import grid, save_png
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.reference import Reference
from diffusion_pl.training.callbacks import Interval, Log, log
from diffusion_pl.training.history import History
from diffusion_pl.training.module import DiffusionModule


class Evaluate(Callback):
    """Draws and measures images of the averaged weights every so many images and at the end.

    Args:
        settings: how many images, which metrics, how often.
        sampler: draws them.
        extractor: the features.
        origin: what numbers say of the weights.
        references: folder of the statistics of real images.
        precision: torch dtype of the network under autocast, None for float32.
        run: the run's folder; grids go to run/samples.
        history: the run's metrics.jsonl.
        training_log: told how long it took, so that the training speed stays true.
    """

    def __init__(
        self,
        settings: Evaluation,
        sampler: Sampler,
        extractor: Extractor,
        *,
        origin: Mapping[str, Any],
        references: Path,
        precision: torch.dtype | None,
        run: Path,
        history: History,
        training_log: Log,
    ) -> None:
        self.settings = settings
        self.sampler = sampler
        self.extractor = extractor
        self.origin = origin
        self.references = references
        self.reference: Reference | None = None
        self.precision = precision
        self.run = run
        self.history = history
        self.training_log = training_log
        self.interval = Interval(settings.every)

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Have the statistics of the real images before the first step; all ranks compute them."""
        images = trainer.datamodule.opened()  # type: ignore[attr-defined]
        device = trainer.strategy.root_device
        self.reference = reference_of(
            images, self.settings, self.extractor, self.references, device
        )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        images = pl_module.images_seen
        self.interval.start(images)
        drawing = self._drawing(trainer, pl_module)
        assert self.reference is not None
        build(drawing, self.settings, self.extractor, self.reference)  # refused before the training
        if trainer.is_global_zero:
            cost = estimate(drawing, self.settings, self.extractor)
            self.training_log.progress.say(
                f"evaluation every {self.settings.every:,} images: {cost}"
            )
        measured = any(row["images"] == images and "name" in row for row in self.history.rows())
        # A run that was stopped between the checkpoint and the end of the evaluation makes it up.
        if images and images % self.settings.every < pl_module.batch_size and not measured:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        images = pl_module.images_seen
        if self.interval.passed(images) and trainer.global_step < trainer.max_steps:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.global_step >= trainer.max_steps:  # not when it was stopped
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: lightning.Trainer, pl_module: DiffusionModule) -> None:
        started = time.monotonic()
        drawing = self._drawing(trainer, pl_module)
        assert self.reference is not None
        progress = self.training_log.progress
        rows, shown = evaluate(
            drawing,
            self.settings,
            self.extractor,
            self.reference,
            progress=progress.evaluating if trainer.is_global_zero else None,
        )
        images = pl_module.images_seen
        if trainer.is_global_zero:
            folder = self.run / "samples"
            folder.mkdir(exist_ok=True)
            save_png(grid(shown), folder / f"{images:012d}.png")
            for row in rows:
                self.history.append({"images": images, **row})
            progress.measured(images, rows)
        log(trainer, {row["name"]: row["value"] for row in rows}, images)
        self.training_log.pause(time.monotonic() - started)

    def _drawing(self, trainer: lightning.Trainer, pl_module: DiffusionModule) -> Drawing:
        return Drawing(
            denoiser=pl_module.ema,
            sampler=self.sampler,
            shape=trainer.datamodule.opened().shape,  # type: ignore[attr-defined]
            classes=pl_module.classes,
            seed=self.settings.seed,
            guidance=self.settings.guidance,
            guidance_interval=self.settings.guidance_interval,
            guide=self.settings.guide,
            precision=self.precision,
            origin=self.origin,
        )
