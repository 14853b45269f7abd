"""The images that a data set is prepared from: what a source holds, one original at a time.

A source's images have a fixed order and are read by their place in it, so any process can read
any part. What kind of source a path names is seen from its name and from what lies in it.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from diffusion_pl.data.files import EXTENSIONS, ending_of, is_leftover
from diffusion_pl.data.shard_format import INDEX, MANIFEST
from diffusion_pl.errors import UserError

Pixels = npt.NDArray[np.uint8]

Kind = Literal["synthetic", "folder", "zip", "cifar10", "tars", "lmdb", "parquet"]

# The settings that a kind of source knows, beside `path` and `labels`.
SETTINGS: dict[Kind, frozenset[str]] = {
    "synthetic": frozenset({"count", "seed"}),
    "folder": frozenset({"split", "label"}),
    "zip": frozenset({"split", "label"}),
    "cifar10": frozenset({"split"}),
    "tars": frozenset({"image", "label", "split"}),
    "lmdb": frozenset(),
    "parquet": frozenset({"image", "label", "split"}),
}

_KNOWN = (
    "a folder or .zip of images, CIFAR-10's .tar.gz or its folder, WebDataset .tar files, an LSUN "
    "folder with data.mdb, .parquet files, or synthetic"
)


@dataclass(frozen=True)
class Original:
    """One image of a source.

    Args:
        name: names it in complaints and in the shards.
        picture: an image file's bytes; or pixels uint8 (3, H, W); or such pixels drawn at each
            resolution.
    """

    name: str
    picture: bytes | Pixels | Mapping[int, Pixels]


class Reader(Protocol):
    """Random access to a source, from any process that has a copy."""

    def read(self, index: int, /) -> Original:
        """An original by its place in the source.

        Raises:
            UserError: it is damaged, in one line.
        """


@dataclass(frozen=True)
class Originals:
    """Everything that a source holds.

    Args:
        name: of the data set.
        reader: of the images.
        count: images.
        listing: digest (hex) of what there is, by name or place; another one is another source.
        labels: int32 (N,), or None when unlabelled.
        classes: number of classes, 0 when unlabelled.
        class_names: in order, or None where the source has none.
        labels_from: what the labels were read from, in words.
        unread: how many members, columns or files of each kind nobody reads.
        notes: what the user should know.
        names: of the images in order, None where they have none but their place.
        states: of each image, what a change of its file changes; None where `listing` tells.
        changed: when the file of each was last written or replaced, ns; None where the others tell.
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


@dataclass(frozen=True)
class Asked:
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
    """

    path: str
    labels: bool | None = None
    count: int | None = None
    seed: int | None = None
    split: str | None = None
    image: str | None = None
    label: str | None = None


def kind_of(path: str) -> tuple[Kind, list[Path]]:
    """What kind of source a path names, and the files it stands for.

    Raises:
        UserError: nothing there, or nothing that is known.
    """
    if path == "synthetic":
        return "synthetic", []
    place = Path(path)
    if place.is_dir():
        return _kind_of_folder(place)
    if place.is_file():
        files = [place]
    else:
        files = sorted(map(Path, glob.glob(path))) if glob.has_magic(path) else []
        if not files:
            raise UserError(f"{path}: no such file or folder; a source is {_KNOWN}")
    kinds = {_kind_of_file(file) for file in files}
    kind = kinds.pop()
    if kinds or (len(files) > 1 and kind not in ("tars", "parquet")):
        raise UserError(f"{path}: names files of several kinds or sources; name one")
    if kind is None:
        raise UserError(f"{path}: not a known kind of source; a source is {_KNOWN}")
    return kind, files


def _kind_of_file(file: Path) -> Kind | None:
    name = file.name.lower()
    kinds: dict[str, Kind] = {
        ".tar.gz": "cifar10",
        ".tgz": "cifar10",
        ".tar": "tars",
        ".zip": "zip",
        ".parquet": "parquet",
        ".mdb": "lmdb",
    }
    return next((kind for ending, kind in kinds.items() if name.endswith(ending)), None)


def _kind_of_folder(folder: Path) -> tuple[Kind, list[Path]]:
    entries = sorted(each for each in folder.iterdir() if not is_leftover(each.name))
    names = {entry.name for entry in entries}
    if _is_prepared(folder):
        raise UserError(
            f"{folder}: is prepared data already; train on it, or take {folder}/shards as a source"
        )
    if "data.mdb" in names:
        return "lmdb", [folder / "data.mdb"]
    cifar = {"cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1", "test_batch"}
    if names & cifar:
        return "cifar10", [folder]
    found: dict[Kind, list[Path]] = {
        "tars": [entry for entry in entries if entry.suffix == ".tar"],
        # The layout of a repository of tables: data/train-00000-of-00010.parquet.
        "parquet": [entry for entry in entries if entry.suffix == ".parquet"]
        or sorted((folder / "data").glob("*.parquet")),
        "folder": [entry for entry in entries if ending_of(entry.name) in EXTENSIONS],
    }
    kinds = [kind for kind, files in found.items() if files]
    if len(kinds) > 1:
        raise UserError(
            f"{folder}: holds {' and '.join(kinds)} side by side; name the files by a pattern, "
            f"such as '{folder}/*.tar'"
        )
    kind = kinds[0] if kinds else "folder"
    return kind, [folder] if kind == "folder" else found[kind]


def _is_prepared(folder: Path) -> bool:
    """Whether `prepare` has made this folder."""
    return (folder / INDEX).is_file() and (folder / MANIFEST).is_file()


def open_originals(asked: Asked, resolutions: Sequence[int]) -> tuple[Kind, Originals]:
    """Look through a source; images are decoded later.

    Args:
        asked: what the user named.
        resolutions: sides at which a set that is drawn is drawn.

    Raises:
        UserError: nothing there, unfit or damaged, or a setting that the source does not know.
    """
    kind, files = kind_of(asked.path)
    for setting in ("count", "seed", "split", "image", "label"):
        if getattr(asked, setting) is not None and setting not in SETTINGS[kind]:
            raise UserError(f"{asked.path}: --{setting} does not apply to a source of kind {kind}")
    originals = _opened(kind, asked, files, resolutions)
    if originals.count < 1:
        raise UserError(f"{asked.path}: no images here")
    if asked.labels and originals.labels is None:
        raise UserError(f"{asked.path}: has no labels; leave out --labels")
    if asked.labels is False and originals.labels is not None:
        bare = replace(originals, labels=None, classes=0, class_names=None, labels_from="")
        return kind, bare
    return kind, originals


def _opened(kind: Kind, asked: Asked, files: list[Path], resolutions: Sequence[int]) -> Originals:
    # Each kind is imported when it is asked for: tables need packages that others do without.
    if kind == "tars":
        from diffusion_pl.data.originals_tars import open_tars

        return open_tars(files, set_name("tars", asked.path), asked)
    if kind == "lmdb":
        from diffusion_pl.data.originals_tables import open_lmdb

        return open_lmdb(files[0], set_name("lsun", asked.path))
    if kind == "parquet":
        from diffusion_pl.data.originals_tables import open_parquet

        return open_parquet(files, set_name("table", asked.path), asked)
    if kind in ("folder", "zip"):
        from diffusion_pl.data.originals_folder import open_folder

        return open_folder(asked, set_name("folder", asked.path))
    from diffusion_pl.data import originals_own

    if kind == "synthetic":
        return originals_own.open_synthetic(asked.count, asked.seed, resolutions)
    if kind == "cifar10":
        return originals_own.open_cifar10(asked.path, asked.split or "train")
    raise AssertionError(kind)


def set_name(kind: str, path: str) -> str:
    """Name a data set after its source: `folder-cats` of `photographs/cats`."""
    place = Path(path)
    own = place.resolve().name if place.is_dir() else place.stem
    if glob.has_magic(own):  # a pattern: the folder it is in, or what it begins with
        own = own.split("*")[0].split("?")[0].split("[")[0] or place.parent.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{kind}-{own}").strip("-.")


def digest_of(lines: Iterable[object]) -> str:
    """Digest (hex) of a listing."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
