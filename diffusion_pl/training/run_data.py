"""The data of a run as Lightning takes it: each device its share of every global batch."""

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
    """Hands each device its share of every global batch, from the position of the run on.

    Args:
        data: what is read, and how batches are made.
        settings: the run's settings.
        network: what will see the images.
        seed: of the order and the flips.
        on_read: called when the first step is about to be read.
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
        """Download or check the data, once a machine."""
        self.data.dataset.prepare()

    def setup(self, stage: str) -> None:
        """Open the data in this process, at every resolution of the run.

        Raises:
            UserError: a resolution, channels or classes that the network was not built for.
        """
        if not self.images:
            self.images = open_for(self.network, self.data)

    def opened(self) -> ImageDataset:
        """The images at full resolution, once `setup` has opened them."""
        return self.images[self.data.dataset.resolution]

    def train_dataloader(self) -> Loader:
        """This device's share of the steps that are still to come."""
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
        """Move images as uint8 and conditions; the index stays on the host, where it seeds."""
        return {
            key: value if key == "index" else value.to(device, non_blocking=True)
            for key, value in batch.items()
        }
