"""The LightningDataModule of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import lightning
import torch
from torch import Tensor, nn

from diffusion_pl.data.loader import DataConfig, Loader
from diffusion_pl.images import ImageDataset
from diffusion_pl.training.opening import Network, open_for
from diffusion_pl.training.settings import TrainerConfig


class RunData(lightning.LightningDataModule):
    """Gives each device its part of every global batch, from the run's current step on.

    Args:
        data: data set and batches.
        settings: budget, accelerator and `read_timeout`.
        network: checked against the data.
        seed: of the order and the flips.
        on_read: called before the first batch is read.
    """

    def __init__(
        self,
        data: DataConfig,
        settings: TrainerConfig,
        network: nn.Module,
        seed: int,
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.data = data
        self.settings = settings
        self.network = cast(Network, network)
        self.seed = seed
        self.on_read = on_read
        self.images: dict[int, ImageDataset] = {}

    def prepare_data(self) -> None:
        """Download or check the data, once per machine."""
        self.data.dataset.prepare()

    def setup(self, stage: str) -> None:
        """Open the data in this process; raises as `open_for`."""
        if not self.images:
            self.images = open_for(self.network, self.data)

    def opened(self) -> ImageDataset:
        """The images at full resolution, once `setup` has opened them."""
        return self.images[self.data.dataset.resolution]

    def train_dataloader(self) -> Loader:
        """This device's batches of the remaining steps."""
        trainer = self.trainer
        assert trainer is not None
        self.on_read()
        return Loader(
            self.data,
            self.images,
            self.seed,
            self.settings.steps(self.data.batch_size),
            start=trainer.global_step,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            pin=self.settings.device_type() == "cuda",
            timeout=self.settings.read_timeout,
        )

    def transfer_batch_to_device(
        self, batch: dict[str, Tensor], device: torch.device, dataloader_idx: int
    ) -> dict[str, Tensor]:
        """Move all but the index, which seeds random numbers on the host."""
        return {
            key: value if key == "index" else value.to(device, non_blocking=True)
            for key, value in batch.items()
        }
