"""Open a run's data at every resolution and check it against the network; no lightning."""

from __future__ import annotations

from typing import Protocol

from diffusion_pl.data.loader import DataConfig
from diffusion_pl.errors import UserError
from diffusion_pl.images import ImageDataset


class Network(Protocol):
    """What training needs of a network beside its forward pass; an nn.Module."""

    classes: int
    channels: int

    def check_resolution(self, height: int, width: int) -> None: ...


def open_for(network: Network, data: DataConfig) -> dict[int, ImageDataset]:
    """Open prepared data at every resolution of the run.

    Raises:
        UserError: a resolution, channels or classes that the network does not take.
    """
    opened: dict[int, ImageDataset] = {}
    whole = data.dataset.resolution
    for resolution in {whole, *(data.resolution_weights or ())}:
        if resolution > whole:
            raise UserError(
                f"data.resolution_weights: {resolution} is more than data.dataset.resolution, "
                f"{whole}"
            )
        opened[resolution] = data.dataset.open(resolution)
        seen = resolution if data.crop is None else min(resolution, data.crop.size)
        network.check_resolution(seen, seen)
    images = opened[whole]
    if images.shards and len(images) < data.batch_size:
        raise UserError(
            f"{images.name}: {len(images):,} images are less than a batch of {data.batch_size:,}"
        )
    if network.channels != images.channels:
        raise UserError(
            f"network.channels is {network.channels}, {images.name} has {images.channels}"
        )
    if network.classes and network.classes != images.classes:
        raise UserError(
            f"network.classes is {network.classes}, {images.name} has {images.classes}; "
            f"set network.classes={images.classes}"
        )
    return opened
