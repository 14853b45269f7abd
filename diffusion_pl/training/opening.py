"""Open a run's data at every resolution and check it against the network; no lightning."""

from __future__ import annotations

from typing import Any, Protocol

from diffusion_pl.data.loader import DataConfig
from diffusion_pl.diffusion.conditions import sizes
from diffusion_pl.errors import UserError
from diffusion_pl.images import ImageDataset


class Network(Protocol):
    """What training needs of a network beside its forward pass; an nn.Module."""

    classes: int
    channels: int

    def check_resolution(self, height: int, width: int) -> None: ...


def check_texts(images: ImageDataset, network: Any) -> None:
    """Refuse data whose captions are not what a network takes.

    Raises:
        UserError: says what to do.
    """
    if not sizes(network)["text"]:
        return
    texts = images.texts
    if texts is None:
        raise UserError(
            f"{images.name} has no encoded captions, and the network takes text; prepare it with "
            "--encode ENCODER, or set network.text_width=0"
        )
    for name, own in (("width", texts.width), ("length", texts.length)):
        if (taken := getattr(network, f"text_{name}")) != own:
            raise UserError(
                f"network.text_{name} is {taken}, the captions of {images.name} have {own}; set "
                f"network.text_{name}={own}"
            )


def open_for(network: Network, data: DataConfig) -> dict[int, ImageDataset]:
    """Open prepared data at every resolution of the run.

    Raises:
        UserError: a resolution, channels, classes or captions that the network does not take.
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
    check_texts(images, network)
    return opened
