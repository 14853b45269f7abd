"""What generated images are asked to be: the conditions of image i, from (seed, i) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_pl.data.loader import Degradation, remains
from diffusion_pl.diffusion.classifier_free import removable
from diffusion_pl.diffusion.degradations import repeated
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.prompts import Prompts, TextEncoder
from diffusion_pl.images import ImageDataset, from_bytes
from diffusion_pl.seeds import seed_of


class Source(Protocol):
    """Where a kind of condition comes from; see `diffusion.conditions`."""

    def condition(self, seed: int, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of the images with these indices, on the CPU."""

    def captions(self, seed: int, indices: Sequence[int]) -> tuple[str, ...] | None:
        """The words of each image; None for a source without words."""

    def about(self) -> Mapping[str, Any]:
        """What is recorded with every number and every image."""


@dataclass(frozen=True)
class Labels:
    """Classes of the images.

    Args:
        classes: their number, at least 1.
        label: of every image; None: as `balanced` says.
        balanced: image i has class i modulo their number; otherwise uniform from (seed, i).
        among: classes in turn: image i has number i modulo how many there are; () for all.

    Raises:
        UserError: a label is out of range.
    """

    classes: int
    label: int | None = None
    balanced: bool = False
    among: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for label in (*self.among, *(() if self.label is None else (self.label,))):
            if not 0 <= label < self.classes:
                known = f"0 to {self.classes - 1}"
                raise UserError(f"label {label} is not one of the model's classes ({known})")

    def condition(self, seed: int, indices: Sequence[int]) -> dict[str, Tensor]:
        """`label`, int64 (n,)."""
        if self.label is not None:
            return {"label": torch.full((len(indices),), self.label)}
        if self.among:
            return {"label": torch.tensor([self.among[i % len(self.among)] for i in indices])}
        if self.balanced:
            return {"label": torch.tensor([i % self.classes for i in indices])}
        return {"label": torch.tensor([seed_of(seed, "label", i) % self.classes for i in indices])}

    def captions(self, seed: int, indices: Sequence[int]) -> None:
        """None: a class is no prompt."""

    def about(self) -> Mapping[str, Any]:
        """The class of every image, or how classes are chosen."""
        if self.among:
            return {"label": None, "labels": f"{','.join(map(str, self.among))} in turn"}
        balanced = self.balanced and self.label is None
        return {"label": self.label, **({"labels": "balanced"} if balanced else {})}


@dataclass(frozen=True, eq=False)
class Captions:
    """Captions of a data set: image i has one of an image that is drawn uniformly from (seed, i).

    Args:
        images: the data; it has texts.
        labelled: give also the class of the image whose caption it is.
        label: draw of the images of this class alone; the data has some.
    """

    images: ImageDataset
    labelled: bool = False
    label: int | None = None

    def condition(self, seed: int, indices: Sequence[int]) -> dict[str, Tensor]:
        """`text` and `text_mask`, and `label` if so asked."""
        table, rows, choice = self.images.texts, *self._drawn(seed, indices)
        assert table is not None
        text, mask = table.read(rows, choice)
        return {"text": text, "text_mask": mask} | _classes(self.images, rows, self.labelled)

    def captions(self, seed: int, indices: Sequence[int]) -> tuple[str, ...]:
        """The caption of each image."""
        table, rows, choice = self.images.texts, *self._drawn(seed, indices)
        assert table is not None
        pairs = zip(rows.tolist(), choice.tolist(), strict=True)
        return tuple(table.caption(image, at) for image, at in pairs)

    def about(self) -> Mapping[str, Any]:
        """The data, and the digest of its captions."""
        assert self.images.texts is not None
        return {"captions": f"{self.images.name} {self.images.texts.fingerprint[:12]}"}

    def _drawn(self, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The image of each caption, and the number in [0, 1) that chooses among its captions."""
        rows = _rows(self.images, seed, indices, self.label)
        return rows, _uniforms(seed, "which caption", indices)


@dataclass(frozen=True, eq=False)
class DataImages:
    """What a degradation leaves of images of a data set: image i is made from one of them that is
    drawn uniformly from (seed, i), the one whose caption `Captions` gives.

    Args:
        images: the data.
        degradation: of the model's training.
        labelled: give also the class of the image.
        label: draw of the images of this class alone; the data has some.
    """

    images: ImageDataset
    degradation: Degradation
    labelled: bool = False
    label: int | None = None

    def condition(self, seed: int, indices: Sequence[int]) -> dict[str, Tensor]:
        """`source` and `source_mask`, and `label` if so asked."""
        rows = _rows(self.images, seed, indices, self.label)
        clean = from_bytes(self.images.read(rows))
        given = _degraded(self.degradation, clean, seed, indices)
        return given | _classes(self.images, rows, self.labelled)

    def captions(self, seed: int, indices: Sequence[int]) -> None:
        """None: an image is no prompt."""

    def about(self) -> Mapping[str, Any]:
        """The data."""
        return {"source": f"{self.images.name} {self.images.fingerprint[:12]}"}


@dataclass(frozen=True, eq=False)
class GivenImages:
    """Given images: image i is made from number i modulo how many there are.

    Args:
        images: each uint8 (C, H, W): of the sample's size, to be degraded as in training, or
            `degradation.times` smaller, to be taken as it is.
        degradation: of the model's training.
        side: of a sample, pixels.
    """

    images: Sequence[Tensor]
    degradation: Degradation
    side: int

    def condition(self, seed: int, indices: Sequence[int]) -> dict[str, Tensor]:
        """`source` and `source_mask`."""
        each = [self._one(seed, i) for i in indices]
        return {key: torch.cat([one[key] for one in each]) for key in each[0]}

    def captions(self, seed: int, indices: Sequence[int]) -> None:
        """None: an image is no prompt."""

    def about(self) -> Mapping[str, Any]:
        """The number of images and their digest."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(repr(tuple(image.shape)).encode() + image.numpy().tobytes())
        return {"source": f"{len(self.images)} {digest.hexdigest()[:12]}"}

    def _one(self, seed: int, index: int) -> dict[str, Tensor]:
        image = from_bytes(self.images[index % len(self.images)])[None]
        if image.shape[-1] == self.side:
            return _degraded(self.degradation, image, seed, [index])
        image = repeated(image, self.degradation.times)
        return {"source": image, "source_mask": torch.ones_like(image[:, :1], dtype=torch.bool)}


def _degraded(
    degradation: Degradation, image: Tensor, seed: int, indices: Sequence[int]
) -> dict[str, Tensor]:
    """What is left of clean images (n, C, H, W), by numbers from (seed, index)."""
    return remains(degradation, image, lambda stream: _uniforms(seed, stream, indices))


def _rows(images: ImageDataset, seed: int, indices: Sequence[int], label: int | None) -> Tensor:
    """An image of the data for each index, of one class or of all."""
    if label is None:
        return torch.tensor([seed_of(seed, "caption", i) % len(images) for i in indices])
    assert images.labels is not None
    own = (images.labels == label).nonzero()[:, 0]
    return own[[seed_of(seed, "caption", i) % len(own) for i in indices]]


def _classes(images: ImageDataset, rows: Tensor, labelled: bool) -> dict[str, Tensor]:
    """`label` of images of the data, if so asked."""
    if not labelled:
        return {}
    assert images.labels is not None
    return {"label": images.labels[rows]}


def _uniforms(seed: int, stream: str, indices: Sequence[int]) -> Tensor:
    """A number in [0, 1) for each index, float64 (n,)."""
    drawn = [(seed_of(seed, stream, i) >> 10) / 2**53 for i in indices]
    return torch.tensor(drawn, dtype=torch.float64)


def own_condition(
    images: ImageDataset,
    indices: Tensor,
    taken: Mapping[str, int],
    degradation: Degradation | None = None,
    encoder: TextEncoder | None = None,
) -> dict[str, Tensor]:
    """The data's own labels, the first caption of each image, and what is left of the image.

    Args:
        images: the data.
        indices: int64 (n,).
        taken: how much of each kind a model takes, see `conditions.sizes`.
        degradation: of the model's training, where it takes images.
        encoder: of the captions that the model was trained with, where that is known.

    Raises:
        UserError: the data has none of what the model takes, or of another size, or captions that
            another encoder encoded.
    """
    condition: dict[str, Tensor] = {}
    if taken["label"]:
        condition["label"] = _labels(images, taken["label"])[indices]
    if width := taken["text"]:
        if images.texts is None:
            raise UserError(
                f"{images.name} has no encoded captions, and the model needs them; prepare it with "
                "--encode ENCODER"
            )
        if images.texts.width != width:
            raise UserError(
                f"{images.name}: {images.texts.encoder} gives {images.texts.width} numbers a "
                f"token, and the model takes {width}; encode it with the run's encoder"
            )
        if encoder is not None:
            encoder.check(images)
        first = torch.zeros(len(indices), dtype=torch.float64)
        condition["text"], condition["text_mask"] = images.texts.read(indices, first)
    if degradation is not None:
        clean = from_bytes(images.read(indices))
        condition |= _degraded(degradation, clean, 0, indices.tolist())
    return condition


def _labels(images: ImageDataset, classes: int) -> Tensor:
    """The labels of data, int64 (N,), if they are of a model's classes."""
    if images.labels is None:
        raise UserError(f"{images.name} has no labels, and the model needs them")
    if images.classes != classes:
        raise UserError(f"{images.name} has {images.classes} classes, and the model {classes}")
    return images.labels


def sources_of(
    taken: Mapping[str, int],
    images: ImageDataset | None,
    *,
    balanced: bool = False,
    label: int | None = None,
    prompts: Prompts | None = None,
    given: GivenImages | None = None,
    degradation: Degradation | None = None,
    dropout: Mapping[str, float] = MappingProxyType({}),
    encoder: TextEncoder | None = None,
) -> tuple[Source, ...]:
    """The sources for all that a model takes, of what was asked for and else of the data.

    Args:
        taken: how much of each kind the model takes, see `conditions.sizes`.
        images: the data, whose captions are taken where there are no prompts, and whose images
            where none are given; with either the image's class, or images of the one that is
            asked for.
        balanced: as for `Labels`.
        label: the class of every image.
        prompts: given ones. A class drawn beside what is given would contradict it: none is where
            none is asked for and the model knows images without.
        given: images that are given.
        degradation: of the model's training, where it takes images.
        dropout: of the model's conditions in training.
        encoder: of the captions that the model was trained with, where that is known.

    Raises:
        UserError: data without the model's classes, or without images of the one asked for, or
            captions that another encoder encoded.
    """
    classes = taken["label"]
    labelled = bool(classes) and label is None
    of_data = (taken["text"] and prompts is None) or (degradation is not None and given is None)
    if classes and of_data and images is not None:
        known = _labels(images, classes)
        if label is not None and not bool((known == label).any()):
            raise UserError(
                f"{images.name} has no image of class {label}, whose caption could be drawn; give "
                "--prompt"
            )
    beside = labelled and (prompts is not None or given is not None)
    hidden = beside and bool(removable(["label"], dropout))
    found: list[Source] = [Labels(classes, label, balanced)] if classes else []
    if degradation is not None:
        if given is None:
            assert images is not None
            found.append(DataImages(images, degradation, labelled, label))
        else:
            found.append(given)
    if taken["text"]:
        if prompts is None:
            assert images is not None
            if encoder is not None:
                encoder.check(images)
            found.append(Captions(images, labelled, label))
        else:
            found.append(prompts)
    # The class of an image of the data stands in for one that is drawn.
    drawn = any(isinstance(each, DataImages | Captions) and each.labelled for each in found)
    return tuple(found[1:] if drawn or hidden else found)
