"""Open a run's data at every resolution and check it against the network; no lightning."""

from __future__ import annotations

from typing import Any, Protocol

import torch

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
            "--encode ENCODER and set data.dataset.text=auto, or set network.text_width=0 "
            "network.text_length=0"
        )
    for name, own in (("width", texts.width), ("length", texts.length)):
        if (taken := getattr(network, f"text_{name}")) != own:
            raise UserError(
                f"network.text_{name} is {taken}, the captions of {images.name} have {own}; set "
                f"network.text_width={texts.width} network.text_length={texts.length}"
            )


def check_images(network: Any, data: DataConfig) -> None:
    """Refuse a network that takes images and data that give it none, or the other way round.

    Raises:
        UserError: says what to do.
    """
    taken, dataset = sizes(network)["image"], data.dataset
    if data.image is None:
        if taken:
            raise UserError(
                f"network.image_channels is {taken}, and data.image does not say what the network "
                "is given; set data.image, or network.image_channels=0"
            )
        return
    if taken != (channels := network.channels):
        raise UserError(
            f"data.image gives the network images of {channels} channels, and "
            f"network.image_channels is {taken}; set network.image_channels={channels}, or "
            "data.image=null"
        )
    if set(data.resolution_weights or ()) - {dataset.resolution}:
        raise UserError("data.image: is given at one resolution; leave data.resolution_weights out")
    side = dataset.resolution
    side = side if data.crop is None else min(side, data.crop.size)
    shape = (1, channels, side, side)
    try:
        data.image(torch.zeros(shape), torch.zeros(1, data.image.draws))
    except UserError as error:
        raise UserError(f"data.image: {error}") from error


def open_for(network: Network, data: DataConfig) -> dict[int, ImageDataset]:
    """Open prepared data at every resolution of the run.

    Raises:
        UserError: a resolution, channels, classes, captions or images that the network does not
            take.
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
    check_images(network, data)
    return opened
