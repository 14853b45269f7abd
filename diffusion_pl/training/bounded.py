"""Bounds how long a run may stand still: ranks that wait for one another, and a process alone."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from diffusion_pl import ranks
from diffusion_pl.training.bounds import Watchdog
from diffusion_pl.training.settings import TrainerConfig


class Bounded(Callback):
    """Ends a run that stands still: patient until its first step, strict from then on.

    Args:
        settings: how long may what take.
    """

    def __init__(self, settings: TrainerConfig) -> None:
        self.settings = settings
        self.watchdog = Watchdog(settings.start_timeout)
        self.begun = False

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        # Every pass is a sign of life: a step may have many, an evaluation thousands.
        for denoiser in (pl_module.denoiser, pl_module.ema):
            denoiser.register_forward_pre_hook(self._sign_of_life)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.watchdog.alive()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.begin()  # what takes longer, compiling say, is done

    def begin(self) -> None:
        """Be strict from now on; safe to call again."""
        if not self.begun:
            self.begun = True
            ranks.wait_at_most(self.settings.timeout)
            self.watchdog.stop()
            self.watchdog.limit = self.settings.watchdog
            self.watchdog.alive()

    def _sign_of_life(self, module: Any, inputs: Any) -> None:
        self.watchdog.alive()
