"""The data of a run as Lightning takes it: each device its share of every global batch."""

from __future__ import annotations

from typing import Protocol, cast

import lightning
import torch
from torch import Tensor, nn

from diffusion_pl.data.loader import Loader, MicroBatches, Share
from diffusion_pl.data.order import Order
from diffusion_pl.data.source import Images, Source
from diffusion_pl.training.settings import Settings


class Network(Protocol):
    """What a run asks of a network beside its forward pass; an nn.Module."""

    classes: int
    channels: int

    def check_resolution(self, height: int, width: int) -> None: ...


class RunData(lightning.LightningDataModule):
    """Hands each device its share of every global batch, from the position of the run on.

    Args:
        source: the data.
        settings: the run's settings.
        network: what will see the images.
        seed: of the order and the flips.
    """

    def __init__(self, source: Source, settings: Settings, network: nn.Module, seed: int) -> None:
        super().__init__()
        self.source = source
        self.settings = settings
        self.network = cast(Network, network)
        self.seed = seed
        self.images: Images | None = None

    def prepare_data(self) -> None:
        """Download or check the data, once a machine."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Open the data in this process.

        Raises:
            ValueError: a resolution, channels or classes that the network was not built for.
        """
        if self.images is None:
            self.images = self.source.open()
        images, network = self.images, self.network
        network.check_resolution(images.resolution, images.resolution)
        if network.channels != images.channels:
            raise ValueError(
                f"network.channels is {network.channels}, {images.name} has {images.channels}"
            )
        if network.classes and network.classes != images.classes:
            raise ValueError(
                f"network.classes is {network.classes}, {images.name} has {images.classes}; "
                f"set network.classes={images.classes}"
            )

    def opened(self) -> Images:
        """The images, once `setup` has opened them."""
        assert self.images is not None
        return self.images

    def train_dataloader(self) -> Loader:
        """The micro-batches of this rank that are still to come."""
        trainer, images = self.trainer, self.opened()
        assert trainer is not None
        batch_size = self.source.batch_size
        size = self.settings.share_size(batch_size, trainer.world_size)
        share = Share(batch_size, size, trainer.global_rank, trainer.world_size)
        batches = MicroBatches(
            images, Order(len(images), self.seed), share, hflip=self.source.hflip
        )
        return Loader(
            batches,
            start=trainer.global_step * share.accumulation,
            stop=self.settings.steps(batch_size) * share.accumulation,
            workers=self.source.workers,
            pin=self.settings.device_type() == "cuda",
        )

    def transfer_batch_to_device(
        self, batch: dict[str, Tensor], device: torch.device, dataloader_idx: int
    ) -> dict[str, Tensor]:
        """Move images as uint8, and labels; positions stay on the host, where they seed."""
        return {
            key: value if key == "index" else value.to(device, non_blocking=True)
            for key, value in batch.items()
        }
