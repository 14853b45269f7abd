"""A run's data opened at every resolution and held against its network; without lightning."""

from __future__ import annotations

from typing import Protocol

from diffusion_pl.data.source import Images, Source
from diffusion_pl.errors import UserError


class Network(Protocol):
    """What a run asks of a network beside its forward pass; an nn.Module."""

    classes: int
    channels: int

    def check_resolution(self, height: int, width: int) -> None: ...


def open_for(network: Network, source: Source) -> dict[int, Images]:
    """Open the data at every resolution of the run.

    Args:
        network: what will see the images.
        source: the data, prepared.

    Raises:
        UserError: a resolution, channels or classes that the network was not built for.
    """
    opened: dict[int, Images] = {}
    for resolution in {source.resolution, *(source.shares or ())}:
        if resolution > source.resolution:
            raise UserError(
                f"data.shares: {resolution} is more than data.resolution, {source.resolution}"
            )
        opened[resolution] = source.open(resolution)
        seen = resolution if source.crop is None else min(resolution, source.crop.size)
        network.check_resolution(seen, seen)
    images = opened[source.resolution]
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
