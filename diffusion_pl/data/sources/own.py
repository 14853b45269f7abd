"""CIFAR-10 and the synthetic images as sources: order, labels and pixels of the data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch

from diffusion_pl.data.captions import captions as captions_of
from diffusion_pl.data.cifar10 import CIFAR10
from diffusion_pl.data.scenes import GROUNDS, Latents, latents
from diffusion_pl.data.shapes import SHAPES
from diffusion_pl.data.sources.base import Original, Originals, Pixels, digest_of
from diffusion_pl.data.sources.captions import CaptionSource, Listed
from diffusion_pl.data.synthetic import Synthetic, render
from diffusion_pl.errors import UserError


@dataclass(frozen=True, eq=False)
class _ArrayReader:
    pixels: Pixels  # (N, 3, H, W)

    def read(self, index: int) -> Original:
        return Original(str(index), self.pixels[index])


def open_cifar10(path: str, split: str) -> Originals:
    """CIFAR-10 in its own order.

    Raises:
        UserError: as `CIFAR10`.
    """
    images = CIFAR10(path, cast(Literal["train", "test"], split)).open()
    assert images.labels is not None
    return Originals(
        name=images.name,
        reader=_ArrayReader(images.read(torch.arange(len(images))).numpy()),
        count=len(images),
        listing=images.fingerprint,
        labels=images.labels.numpy().astype(np.int32),
        classes=images.classes,
        class_names=list(images.class_names),
        labels_from="CIFAR-10",
    )


@dataclass(frozen=True, eq=False)
class _SceneReader:
    scenes: Latents
    resolutions: tuple[int, ...]

    def read(self, index: int) -> Original:
        scene = self.scenes[index : index + 1]
        drawn = {side: render(scene, side)[0] for side in self.resolutions}
        return Original(str(index), drawn)


def open_synthetic(
    count: int | None, seed: int | None, resolutions: Sequence[int], *, captions: bool = False
) -> Originals:
    """The synthetic set, rendered at each resolution rather than reduced.

    Args:
        count: number of images.
        seed: which scenes; None: 0.
        resolutions: sides in pixels.
        captions: whether the scenes describe themselves.

    Raises:
        UserError: no count, or a number out of range.
    """
    if count is None:
        raise UserError("synthetic: the number of images is missing; add --count 10000")
    Synthetic(count, min(resolutions), seed or 0).prepare()
    scenes = latents(seed or 0, 0, count, GROUNDS)
    said = captions_of(scenes, seed or 0, range(count)) if captions else []
    words: list[list[Any]] = [[caption] for caption in said]
    return Originals(
        name="synthetic",
        reader=_SceneReader(scenes, tuple(resolutions)),
        count=count,
        listing=digest_of(["synthetic", seed or 0, count]),
        labels=scenes.label.astype(np.int32),
        classes=len(SHAPES),
        class_names=list(SHAPES),
        labels_from="the shape",
        captions=CaptionSource(Listed(words), "the scene") if captions else None,
    )
