"""All workarounds for Lightning, each with its reason; the rest of training uses it as it is."""

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
    """A LightningModule whose hooks cost little."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets the current hook's name about forty times a step; torch would check each
        # time whether it is a parameter, 0.1 ms in all.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class CheckpointFiles(CheckpointIO):
    """Checkpoints are written atomically, and read without running any code in them."""

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
    """No profiler, at no cost: Lightning calls it about seventy times a step, 0.1 ms in all."""

    def profile(self, action_name: str) -> contextlib.nullcontext[str]:  # type: ignore[override]
        return _NOTHING


_NOTHING = contextlib.nullcontext("")


def profiler(settings: TrainerConfig, run: Path) -> Profiler:
    """The profiler of a run, which writes to the run's folder.

    Raises:
        UserError: not a profiler of Lightning's.
    """
    given: Any = settings.profiler
    if given is None:
        return Unprofiled()
    made = _PROFILERS[given]() if isinstance(given, str) else given
    if not isinstance(made, Profiler):
        raise UserError(
            f"trainer.profiler: must be one of Lightning's (got a {type(made).__name__})"
        )
    # Without a file Lightning logs the report, which `quiet_lightning` suppresses.
    made.dirpath = made.dirpath or run / PROFILES
    made.filename = made.filename or "report"
    return made


def precision_plugin(precision: str, settings: TrainerConfig) -> Precision:
    """The precision plugin; explicit, since on a CPU Lightning replaces fp16 by bf16."""
    device = settings.device_type()
    if precision == "fp32":
        return Precision()
    if precision == "bf16":
        return MixedPrecision("bf16-mixed", device)
    return MixedPrecision("16-mixed", device, torch.amp.GradScaler(device))


@contextlib.contextmanager
def in_a_line() -> Iterator[None]:
    """Turn Lightning's complaints about settings into a `UserError` of one line."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Suppress Lightning's banners, and warnings about what this package replaces."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Images in memory are read fastest without workers.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # The moving average never trains.
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
            # The loader itself starts at the images seen.
            warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")
            # Rows are logged by `Log`, not by Lightning.
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
            # Lightning's own use of torch's trees.
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
