"""Evaluates the averaged weights during training: samples images and computes metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from diffusion_pl.diffusion.conditions import sizes
from diffusion_pl.diffusion.guidance import guide_of
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation, ImageGenerator, Sampler, evaluate, reference_of
from diffusion_pl.evaluation.cost import estimate
from diffusion_pl.evaluation.measuring import Interrupted, build
from diffusion_pl.evaluation.prompts import (
    Prompts,
    TextEncoder,
    encoded,
    located,
    read_prompts,
)
from diffusion_pl.evaluation.sources import sources_of
from diffusion_pl.images import grid, save_png
from diffusion_pl.interop import statistics
from diffusion_pl.io.files import regular
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.reference import Reference
from diffusion_pl.training import sharding
from diffusion_pl.training.best import Best
from diffusion_pl.training.callbacks import Interval, Log, Stop, log
from diffusion_pl.training.history import History
from diffusion_pl.training.loggers import show, summarise
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.sanity import NonFiniteError


def grid_of(run: Path, images: int) -> Path:
    """The file of the sample grid after `images` images."""
    return run / "samples" / f"{images:012d}.png"


_PNG_END = b"IEND\xaeB\x60\x82"  # the last chunk of every PNG


def is_evaluated(run: Path, settings: Evaluation, images: int) -> bool:
    """Whether a run's model after `images` images was evaluated.

    A truncated grid, as a power cut may leave it, counts as not evaluated; a missing grid only if
    there are no metrics to tell.
    """
    grid = grid_of(run, images)
    if grid.exists() and not regular(grid).read_bytes().endswith(_PNG_END):
        return False
    if settings.metrics:
        return History(run / "metrics.jsonl").measured(images)
    return grid.exists()


class Evaluate(Callback):
    """Evaluates the averaged weights at intervals and at the end.

    Args:
        settings: number of images, metrics, interval.
        sampler: from noise to images.
        extractor: of features.
        origin: description of the weights, kept with every number.
        references: folder of reference statistics.
        precision: autocast dtype of the network, None for float32.
        run: the run's folder; grids go to run/samples.
        history: the run's metrics.jsonl.
        training_log: excludes the time of evaluations from the training speed.
        stop: polled; if true, the evaluation ends and is repeated on resume.
        config: resolved, for the loggers' summary.
        best: keeps the best checkpoint, or None.
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
        stop: Stop,
        config: Mapping[str, Any],
        best: Best | None = None,
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
        self.stop = stop
        self.config = config
        self.best = best
        self.interval = Interval(settings.every)
        self.prompts: Prompts | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Load or compute the reference statistics before the first step, on all ranks."""
        if self.best is not None:
            known = [n for m in self.settings.metrics for n in m.numbers(self.extractor)]
            if self.best.number not in known:
                raise UserError(
                    f"trainer.keep_best: {self.best.number} is not measured (measured: "
                    f"{', '.join(known) or 'nothing'}); add its metric to evaluation.metrics"
                )
        images = trainer.datamodule.opened()  # type: ignore[attr-defined]
        if self.settings.prompts is not None and images.texts is not None:
            words = read_prompts(located(self.settings.prompts))
            self.prompts = encoded(words, TextEncoder.of(images.texts).load())
        device = trainer.strategy.root_device
        self.reference = reference_of(
            images,
            self.settings,
            self.extractor,
            self.references,
            device,
            open_file=statistics.open_any,
        )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        images = pl_module.images_seen
        self.interval.start(images)
        generator = self._generator(trainer, pl_module)
        assert self.reference is not None
        # What cannot be measured is refused before the training.
        build(generator, self.settings, self.extractor, self.reference)
        with sharding.assembled(pl_module.ema):
            # On every rank, so that an error of the sampler ends them all.
            cost = estimate(generator, self.settings, self.extractor)
        if trainer.is_global_zero:
            self.training_log.progress.say(
                f"evaluation every {self.settings.every:,} images: {cost}"
            )
        # Repeat an evaluation that was stopped after its checkpoint.
        due = images and images % self.settings.every < pl_module.batch_size
        done = not due or is_evaluated(self.run, self.settings, images)
        if not trainer.strategy.broadcast(done):
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

    def make_up(self, trainer: lightning.Trainer, pl_module: DiffusionModule) -> None:
        """Evaluate a trained model whose final evaluation was stopped."""
        pl_module.to(trainer.strategy.root_device)
        if trainer.is_global_zero:
            self.training_log.progress.start(pl_module.images_seen)
        self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: lightning.Trainer, pl_module: DiffusionModule) -> None:
        started = time.monotonic()
        generator = self._generator(trainer, pl_module)
        assert self.reference is not None
        progress = self.training_log.progress
        images = pl_module.images_seen
        try:
            with sharding.assembled(pl_module.ema):  # ranks sample different numbers of images
                rows, shown = evaluate(
                    generator,
                    self.settings,
                    self.extractor,
                    self.reference,
                    progress=progress.evaluating if trainer.is_global_zero else None,
                    stop=self.stop.wanted,
                )
        except Interrupted:
            progress.measured(images, [])
            self.stop.end(trainer)
            return
        except ValueError as error:  # settings were checked before, so the images are at fault
            problem = f"the evaluation after {images:,} images: {error}"
            raise NonFiniteError(trainer.global_step, problem) from error
        self._keep_best(trainer, images, rows)  # before the rows, which mark the evaluation as done
        if trainer.is_global_zero:
            self.training_log.check()
            path = grid_of(self.run, images)
            names = trainer.datamodule.opened().class_names  # type: ignore[attr-defined]
            sheet = generator.beside_sources(range(len(shown)), shown)
            sheet = grid(sheet, words=generator.words(range(len(shown)), names))
            save_png(sheet, path)
            show(trainer, sheet, images)
            self.history.measure(images, rows)
            progress.measured(images, rows)
        log(trainer, {row["name"]: row["value"] for row in rows}, images)
        if trainer.global_step >= trainer.max_steps:
            summarise(trainer, self.config, rows)
        self.training_log.pause(time.monotonic() - started)

    def _keep_best(
        self, trainer: lightning.Trainer, images: int, rows: list[dict[str, Any]]
    ) -> None:
        """Keep the checkpoint if this evaluation is the best so far; every rank calls it."""
        if self.best is None:
            return
        # Rank 0 decides: others might read while it writes.
        if not trainer.strategy.broadcast(self.best.is_better(rows)):
            return
        saved = self.run / "checkpoints" / f"{images:012d}.ckpt"
        if trainer.strategy.broadcast(saved.exists()):
            if trainer.is_global_zero:
                self.best.take(saved)
        else:
            trainer.save_checkpoint(self.best.path)
        if trainer.is_global_zero:
            self.best.write(rows, images)

    def _generator(self, trainer: lightning.Trainer, pl_module: DiffusionModule) -> ImageGenerator:
        images = trainer.datamodule.opened()  # type: ignore[attr-defined]
        sources = sources_of(
            sizes(pl_module.ema.network),
            images,
            balanced=self.settings.labels == "balanced",
            prompts=self.prompts,
            degradation=trainer.datamodule.data.image,  # type: ignore[attr-defined]
            dropout=pl_module.settings.dropout,
        )
        return ImageGenerator(
            denoiser=pl_module.ema,
            sampler=self.sampler,
            shape=images.shape[1:],
            sources=sources,
            dropout=pl_module.settings.dropout,
            seed=self.settings.seed,
            guidance=self.settings.guidance,
            guidance_interval=self.settings.guidance_interval,
            guide=guide_of(self.settings.guide, pl_module.ema),
            precision=self.precision,
            origin=self.origin,
        )
