"""Measures the held-out loss during training, of averaged and raw weights; training is as without.

Weights and data are read, in evaluation mode and without gradients; no random number of the
training is drawn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from diffusion_pl.data.dataset import DatasetSpec
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation
from diffusion_pl.evaluation.held_out import HeldOut, measure, open_held_out
from diffusion_pl.images import ImageDataset
from diffusion_pl.training import sharding
from diffusion_pl.training.callbacks import Interval, Log, log
from diffusion_pl.training.history import History
from diffusion_pl.training.sanity import NonFiniteError


class HeldOutLosses(Callback):
    """Measures the held-out loss at intervals and at the end.

    It comes before the checkpoint of the same step, which then always has its rows.

    Args:
        settings: of the evaluation, with `losses`.
        dataset: images that are not trained on; None: the data set's own, else its last images.
        precision: autocast dtype of the network, None for float32.
        ema: the average, as it is recorded.
        history: the run's metrics.jsonl.
        training_log: excludes the time of measurements from the training speed.
    """

    def __init__(
        self,
        settings: Evaluation,
        dataset: DatasetSpec | None,
        *,
        precision: torch.dtype | None,
        ema: str,
        history: History,
        training_log: Log,
    ) -> None:
        assert settings.losses is not None
        self.settings = settings.losses
        self.batch_size = settings.batch_size
        self.dataset = dataset
        self.precision = precision
        self.ema = ema
        self.history = history
        self.training_log = training_log
        self.interval = Interval(self.settings.every or settings.every)
        self.held: HeldOut | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Read the images, on all ranks, before the first step."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        say = self.training_log.progress.say if trainer.is_global_zero else None
        self.held = self._open(data.opened(), data.data, pl_module.denoiser.network, say)
        if trainer.is_global_zero:
            trained = "" if self.held.held_out else ", which are trained on"
            self.training_log.progress.say(
                f"held-out loss every {self.interval.every:,} images: on {self.held.which} of "
                f"{self.held.name}{trained}"
            )

    def _open(
        self,
        training: ImageDataset,
        data: Any,
        network: nn.Module,
        say: Callable[[str], None] | None,
    ) -> HeldOut:
        dataset, own = self.dataset, getattr(data.dataset, "validation", None)
        if dataset is None and own is not None and (dataset := own()) is not None:
            try:
                return open_held_out(self.settings, training, dataset, network, data.image)
            except UserError as error:  # such as an archive without test images
                if say is not None:
                    say(f"no held-out images: {error}")
                dataset = None
        return open_held_out(self.settings, training, dataset, network, data.image)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.interval.start(pl_module.images_seen)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = trainer.global_step >= trainer.max_steps
        if self.interval.passed(pl_module.images_seen) or last:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        started, images = time.monotonic(), pl_module.images_seen
        assert self.held is not None
        rows = []
        for weights in ("ema", "denoiser"):
            denoiser = getattr(pl_module, weights)
            # An average is whole while it is measured; trained weights gather themselves.
            whole = sharding.assembled(pl_module.ema) if weights == "ema" else _evaluated(denoiser)
            with whole:
                row = measure(
                    self.held,
                    self.settings,
                    denoiser,
                    pl_module.objective.preconditioning.sigma_range,
                    precision=self.precision,
                    batch_size=self.batch_size,
                )
            averaged = {"ema": self.ema} if weights == "ema" else {}
            rows.append({**row, "weights": weights, **averaged})
        if bad := [row["weights"] for row in rows if not math.isfinite(row["value"])]:
            problem = f"the held-out loss of {bad[0]} after {images:,} images is not finite"
            raise NonFiniteError(trainer.global_step, problem)
        if trainer.is_global_zero:
            self.training_log.check()
            self.history.measure(images, rows)
            self.training_log.progress.held_out(images, rows)
        log(trainer, numbers(rows), images)
        self.training_log.pause(time.monotonic() - started)


def numbers(rows: list[dict[str, Any]]) -> Mapping[str, float]:
    """What loggers are told of rows: the loss of each kind of weights, and at each level."""
    told = {}
    for row in rows:
        name = f"{row['name']}/{'raw' if row['weights'] == 'denoiser' else row['weights']}"
        told[name] = row["value"]
        for level in row["levels"]:
            told[f"{name}/sigma={level['sigma']:.3g}"] = level["loss"]
    return told


@contextmanager
def _evaluated(denoiser: nn.Module) -> Iterator[None]:
    """Context in which a denoiser that trains is in evaluation mode."""
    modes = [(part, part.training) for part in denoiser.modules()]
    denoiser.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        sharding.shard_again(denoiser)
