"""Where we work around Lightning, each time with the reason; the rest of training uses it as it is.

- `CheckpointFiles`: checkpoints are written whole or not at all, and read without running anything.
- `Unprofiled`, `QuickModule`: what Lightning asks for at every step, and what it would cost.
- `precision_plugin`: on a CPU Lightning takes bf16 for fp16.
- `quiet_lightning`: its hints are about what we have replaced.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import (
    AdvancedProfiler,
    PassThroughProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from diffusion_pl.errors import UserError
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.settings import TrainerConfig

PROFILES = "profiler"  # the folder of a run where profilers write
_PROFILERS = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


class QuickModule(lightning.LightningModule):
    """A LightningModule in which a hook costs little."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the name of the hook it calls some forty times a step; torch would each
        # time ask whether it is a parameter, 0.1 ms in all.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


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


class Unprofiled(PassThroughProfiler):
    """No profiler, at no cost: Lightning asks it some seventy times a step, 0.1 ms in all."""

    def profile(self, action_name: str) -> contextlib.nullcontext[str]:  # type: ignore[override]
        """A context that does nothing."""
        return _NOTHING


_NOTHING = contextlib.nullcontext("")


def profiler(settings: TrainerConfig, run: Path) -> Profiler:
    """The profiler that a run is trained under; its report lies in the run's folder.

    Raises:
        UserError: what is named makes none of Lightning's.
    """
    given: Any = settings.profiler
    if given is None:
        return Unprofiled()
    made = _PROFILERS[given]() if isinstance(given, str) else given
    if not isinstance(made, Profiler):
        raise UserError(
            f"trainer.profiler: must be one of Lightning's (got a {type(made).__name__})"
        )
    # Else Lightning says the report where `quiet_lightning` keeps it off the terminal.
    made.dirpath = made.dirpath or run / PROFILES
    made.filename = made.filename or "report"
    return made


def precision_plugin(precision: str, settings: TrainerConfig) -> Precision:
    """How a run computes; said outright, since on a CPU Lightning takes bf16 for fp16."""
    device = settings.device_type()
    if precision == "fp32":
        return Precision()
    if precision == "bf16":
        return MixedPrecision("bf16-mixed", device)
    return MixedPrecision("16-mixed", device, torch.amp.GradScaler(device))


@contextlib.contextmanager
def in_a_line() -> Iterator[None]:
    """Within it what Lightning finds wrong with its settings is an error of the user's.

    Raises:
        UserError: it does.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


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
