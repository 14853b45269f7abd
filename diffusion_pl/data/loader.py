"""Batches for one device: its share of every global batch, from any position of the run on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion_pl.data.order import Order
from diffusion_pl.data.source import Images


@dataclass(frozen=True)
class Share:
    """How a global batch is cut: micro-batch by micro-batch over the ranks.

    Args:
        batch_size: images of an optimizer step over all devices.
        device_batch_size: images of one forward and backward pass on one device.
        rank: this device, 0 .. world_size - 1.
        world_size: number of devices.

    Raises:
        ValueError: device_batch_size x world_size does not divide batch_size.
    """

    batch_size: int
    device_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.device_batch_size * self.world_size):
            raise ValueError(
                f"{self.world_size} devices with {self.device_batch_size} images each cannot make "
                f"a global batch of {self.batch_size} by accumulation"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches an optimizer step."""
        return self.batch_size // (self.device_batch_size * self.world_size)

    def first(self, micro_batch: int) -> int:
        """Position in the run of the first image of this rank's micro-batch, counted from 0."""
        return (micro_batch * self.world_size + self.rank) * self.device_batch_size


class MicroBatches(Dataset):
    """The run as a map from the number of a micro-batch to its images, for one rank.

    Args:
        images: the data set.
        order: which image stands where in the run.
        share: this rank's cut.
        hflip: flip half of the images left to right, by (seed, position).
    """

    def __init__(self, images: Images, order: Order, share: Share, hflip: bool) -> None:
        self.images = images
        self.order = order
        self.share = share
        self.hflip = hflip

    def __getitem__(self, micro_batch: int) -> dict[str, Tensor]:
        first = self.share.first(micro_batch)
        last = first + self.share.device_batch_size
        indices = self.order(first, last)
        image = self.images.read(indices)
        if self.hflip:
            flipped = self._coins(first, last)
            image = torch.where(flipped[:, None, None, None], image.flip(-1), image)
        batch = {"image": image, "index": torch.arange(first, last)}
        if self.images.labels is not None:
            batch["label"] = self.images.labels[indices]
        return batch

    def _coins(self, first: int, last: int) -> Tensor:
        """One fair coin a position: the low bit of a hash of (seed, position)."""
        mixed = torch.arange(first, last) * 0x9E3779B97F4A7C1 + self.order.seed * 0x632BE59BD9B4E01
        mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B
        return (mixed ^ (mixed >> 32)) & 1 == 1


class Loader:
    """Iterates over a rank's micro-batches from a position of the run to its end.

    Its length is the whole run's, whatever the start: Lightning, resuming, counts the micro-batches
    that are done as fetched.

    Args:
        batches: the run.
        start: first micro-batch.
        stop: the micro-batch after the last.
        workers: processes that read ahead; 0 reads in this process, best for images in memory.
        pin: copy to page-locked memory, for transfers to a GPU.
    """

    def __init__(
        self, batches: MicroBatches, start: int, stop: int, workers: int = 0, pin: bool = False
    ) -> None:
        self.batches = batches
        self.start = start
        self.stop = stop
        self.workers = workers
        self.pin = pin

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.workers == 0 and not self.pin:
            return (self.batches[number] for number in range(self.start, self.stop))
        return iter(
            DataLoader(
                self.batches,
                batch_size=None,
                sampler=range(self.start, self.stop),
                num_workers=self.workers,
                pin_memory=self.pin,
                persistent_workers=False,
            )
        )
