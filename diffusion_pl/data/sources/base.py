"""The images that a data set is prepared from, read one by one by their index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from diffusion_pl.data.labels import ImageLabels

if TYPE_CHECKING:
    from diffusion_pl.data.sources.captions import CaptionSource

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Original:
    """One image of a source.

    Args:
        name: in error messages and in the shards.
        image: the bytes of an image file, or pixels uint8 (3, H, W), or such pixels by resolution.
    """

    name: str
    image: bytes | Pixels | Mapping[int, Pixels]


class Reader(Protocol):
    """Random access to a source, from any process that has a copy."""

    def read(self, index: int, /) -> Original:
        """An original by its index in the source; raises UserError if it is damaged."""


@dataclass(frozen=True)
class Originals:
    """Everything that a source holds.

    Args:
        name: of the data set.
        reader: of the images.
        count: images.
        listing: digest (hex) of the names or places of the images, which identifies the source.
        labels: int32 (N,), or None when unlabelled.
        classes: number of classes, 0 when unlabelled.
        class_names: in order, or None where the source has none.
        labels_from: what the labels were read from, in words.
        unread: how many members, columns or files of each kind are not read.
        notes: for the user.
        names: of the images in order, None where they have only an index.
        states: of each image, as of `Files.state`; None where `listing` covers changes.
        changed: when the file of each was last written or replaced, ns; None where the others
            cover changes.
        captions: of the images, None where there are none or they are not wanted.
    """

    name: str
    reader: Reader
    count: int
    listing: str
    labels: npt.NDArray[np.int32] | None = None
    classes: int = 0
    class_names: list[str] | None = None
    labels_from: str = ""
    unread: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    names: list[str] | None = None
    states: list[str] | None = None
    changed: Sequence[int] | npt.NDArray[np.int64] | None = None
    captions: CaptionSource | None = None


@dataclass(frozen=True)
class SourceSpec:
    """A source as the user named it; None leaves a setting to the source.

    Args:
        path: file, folder or pattern; or `synthetic`.
        labels: True wants classes (of a folder: its first folders), False drops them; None takes
            those that are written down.
        count: images of the synthetic set.
        seed: of the synthetic set.
        split: train or test of CIFAR-10; one of a folder's, a table's or tars' splits.
        image: name of the images in a table or of their ending in a tar, where there are several.
        label: the same of the labels; beside a folder's images, a column of metadata.csv.
        captions: True wants captions, False drops them; None takes those that are there.
        caption: columns of a table, endings of files or `json.FIELD`, or a COCO file; several with
            commas between.
    """

    path: str
    labels: bool | None = None
    count: int | None = None
    seed: int | None = None
    split: str | None = None
    image: str | None = None
    label: str | None = None
    captions: bool | None = None
    caption: str | None = None

    @property
    def caption_fields(self) -> list[str] | None:
        """What `caption` names; None where it names nothing."""
        if self.caption is None:
            return None
        return [word for each in self.caption.split(",") if (word := each.strip())]


def label_fields(found: ImageLabels | None) -> dict[str, Any]:
    """The fields of `Originals` that say what the labels are."""
    if found is None:
        return {}
    return {
        "labels": np.array(found.labels, dtype=np.int32),
        "classes": found.classes,
        "class_names": found.names,
        "labels_from": found.source,
    }


def digest_of(lines: Iterable[object]) -> str:
    """Digest (hex) of a listing."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
