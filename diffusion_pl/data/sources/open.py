"""Find the kind of source that a path names, from its name and content, and open it."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from diffusion_pl.data.files import EXTENSIONS, ending_of, is_leftover
from diffusion_pl.data.shard_format import INDEX, MANIFEST
from diffusion_pl.data.sources import folder
from diffusion_pl.data.sources.base import Originals, SourceSpec
from diffusion_pl.data.sources.captions import absent, refuse_empty
from diffusion_pl.errors import UserError

Kind = Literal["synthetic", "folder", "zip", "cifar10", "tars", "lmdb", "parquet"]

# The settings of each kind of source, besides `path`, `labels` and `captions`.
SETTINGS: dict[Kind, frozenset[str]] = {
    "synthetic": frozenset({"count", "seed"}),
    "folder": frozenset({"split", "label", "caption"}),
    "zip": frozenset({"split", "label", "caption"}),
    "cifar10": frozenset({"split"}),
    "tars": frozenset({"image", "label", "split", "caption"}),
    "lmdb": frozenset(),
    "parquet": frozenset({"image", "label", "split", "caption"}),
}

_KNOWN = (
    "a folder or .zip of images, CIFAR-10's .tar.gz or its folder, WebDataset .tar files, an LSUN "
    "folder with data.mdb, .parquet files, or synthetic"
)


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


def open_originals(spec: SourceSpec, resolutions: Sequence[int]) -> tuple[Kind, Originals]:
    """List the images of a source; they are decoded later.

    Args:
        spec: the source as the user named it.
        resolutions: sides in pixels at which the synthetic set is rendered.

    Raises:
        UserError: nothing there, unfit or damaged, or a setting that the source does not know.
    """
    kind, files = kind_of(spec.path)
    for setting in ("count", "seed", "split", "image", "label", "caption"):
        if getattr(spec, setting) is not None and setting not in SETTINGS[kind]:
            raise UserError(f"{spec.path}: --{setting} does not apply to a source of kind {kind}")
    originals = _opened(kind, spec, files, resolutions)
    if originals.count < 1:
        raise UserError(f"{spec.path}: no images here")
    if spec.labels and originals.labels is None:
        raise UserError(f"{spec.path}: has no labels; leave out --labels")
    if spec.captions and originals.captions is None:
        raise absent(spec.path, [])
    if originals.captions is not None and (spec.captions or spec.caption is not None):
        refuse_empty(originals.captions, originals.count, spec.path)
    if spec.labels is False and originals.labels is not None:
        bare = replace(originals, labels=None, classes=0, class_names=None, labels_from="")
        return kind, bare
    return kind, originals


def _opened(
    kind: Kind, spec: SourceSpec, files: list[Path], resolutions: Sequence[int]
) -> Originals:
    # Imported only when needed: tables need packages that others do without.
    if kind == "tars":
        from diffusion_pl.data.sources.tars import open_tars

        return open_tars(files, set_name("tars", spec.path), spec)
    if kind == "lmdb":
        from diffusion_pl.data.sources.tables import open_lmdb

        return open_lmdb(files[0], set_name("lsun", spec.path))
    if kind == "parquet":
        from diffusion_pl.data.sources.tables import open_parquet

        return open_parquet(files, set_name("table", spec.path), spec)
    if kind in ("folder", "zip"):
        return folder.open_folder(spec, set_name("folder", spec.path))
    # These wait for torch, which a folder's listing does not.
    from diffusion_pl.data.sources import own

    if kind == "synthetic":
        return own.open_synthetic(spec.count, spec.seed, resolutions, captions=bool(spec.captions))
    return own.open_cifar10(spec.path, spec.split or "train")


def set_name(kind: str, path: str) -> str:
    """Name a data set after its source: `folder-cats` of `photographs/cats`."""
    place = Path(path)
    own = place.resolve().name if place.is_dir() else place.stem
    if glob.has_magic(own):  # a pattern: the folder it is in, or what it begins with
        own = own.split("*")[0].split("?")[0].split("[")[0] or place.parent.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{kind}-{own}").strip("-.")
