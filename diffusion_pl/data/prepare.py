"""Prepare a data set: write a source as shards; the same command resumes."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_pl import locks
from diffusion_pl.data.files import is_leftover
from diffusion_pl.data.recipe import CHANGED, STEPS, Recipe
from diffusion_pl.data.relisting import check_unchanged, is_as_made, source_state, written_since
from diffusion_pl.data.shard_format import (
    MANIFEST,
    PROGRESS,
    SHARDS,
    Manifest,
    key_of,
)
from diffusion_pl.data.shard_workers import too_many, write_all
from diffusion_pl.data.sources.base import SourceSpec
from diffusion_pl.data.sources.open import open_originals
from diffusion_pl.data.stored import TEXT
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import last_change, regular, write_atomically
from diffusion_pl.names import refuse_class_names, refuse_name, shown
from diffusion_pl.progress import Report

if TYPE_CHECKING:
    from diffusion_pl.data.write_shards import Job, Written

_SETTINGS = "settings.json"
_LOCK = "lock"


@dataclass(frozen=True)
class Request:
    """What to prepare.

    Args:
        source: of the images.
        recipe: resolutions, filter and encoding.
        name: of the data set; None names it after its source.
    """

    source: SourceSpec
    recipe: Recipe
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            refuse_name(self.name, "--name", "name the data set otherwise")

    def settings(self) -> dict[str, Any]:
        """The settings that make two requests the same, as dataset.json has them."""
        source = asdict(self.source) | {"path": os.path.normpath(self.source.path)}
        # Absent where they change nothing, as in older data sets.
        for name, same in (("captions", (None, True)), ("caption", (None,))):
            if source[name] in same:
                del source[name]
        drawn = self.source.path == "synthetic"
        return {
            "name": self.name,
            "resolutions": self.recipe.descending,
            "encoding": self.recipe.encoding,
            "filter": "drawn" if drawn else self.recipe.filter,
            "fit": "drawn" if drawn else self.recipe.fit,
            "shard_images": self.recipe.shard_images,
            "channels": self.recipe.channels,
            "source": source,
        }


def prepare(
    request: Request,
    folder: Path,
    *,
    workers: int,
    skip_broken: int = 0,
    report: Report,
    relist: bool = True,
) -> tuple[Manifest, bool]:
    """Write the shards that are missing, then the index and `dataset.json`.

    Args:
        request: what to prepare.
        folder: absent, empty, or begun or finished by the same request.
        workers: number of processes.
        skip_broken: how many images that cannot be read may be left out.
        report: called with images of earlier runs, of this run, and in all.
        relist: whether the source of a finished data set is compared with it.

    Returns:
        The manifest, and whether the data set was there before.

    Raises:
        UserError: an unfit source, a folder of other files, a full disk.
        WorkerLost: a process was killed.
    """
    if (folder / MANIFEST).exists():
        manifest = Manifest.read(folder)
        _refuse_difference(asdict(manifest), request.settings(), folder)
        note = check_unchanged(manifest, request.source, request.recipe, folder) if relist else None
        shutil.rmtree(folder / PROGRESS, ignore_errors=True)
        if note:
            manifest = replace(manifest, notes=[*(manifest.notes or []), note])
        return manifest, True
    refuse_name(folder.resolve().name, shown(str(folder)), "prepare the data in another folder")
    _check_place(folder, request.source.path)
    # webdataset imports torch, which a finished folder or a wrong setting need not wait for.
    from diffusion_pl.data.write_shards import Job, finish, read_written, write_shard

    kind, originals = open_originals(request.source, request.recipe.descending)
    refuse_class_names(
        originals.class_names or (),
        shown(request.source.path),
        written=kind not in ("folder", "zip"),
    )
    settings = request.settings() | {"name": request.name or originals.name}
    settings["source"] |= {"kind": kind} | source_state(originals)
    # Folders begun before there was a choice of channels lack the key.
    begun = {k: v for k, v in settings.items() if (k, v) != ("channels", 3)}
    if request.recipe.filter in CHANGED:
        begun |= {"recipe": STEPS}
    with _claimed(folder, begun):
        job = Job(folder, originals, request.recipe, request.source.path)
        before = [(number, read_written(job, number)) for number in range(job.shards)]
        _check_written(job, before)
        missing = [number for number, shard in before if shard is None]
        skipped = [text for _, shard in before if shard for text in shard.skipped.values()]
        if len(skipped) > skip_broken:
            raise UserError(too_many(skipped[skip_broken], skip_broken + 1, skip_broken))
        earlier = originals.count - sum(len(job.images(number)) for number in missing)
        write_all(
            functools.partial(write_shard, job),
            missing,
            workers=workers,
            skipped=len(skipped),
            allowed=skip_broken,
            report=lambda done: report(earlier, done, originals.count),
        )
        return finish(job, settings), False


def _check_written(job: Job, before: Sequence[tuple[int, Written | None]]) -> None:
    """Raise UserError if an image of a finished shard was replaced in the source since."""
    for number, shard in before:
        if shard is None:
            continue
        kept = [index for index in job.images(number) if key_of(index) not in shard.skipped]
        made = last_change(job.folder / shard.shard.file)
        for index in written_since(job.originals, dict.fromkeys(kept, made)):
            row = shard.rows[kept.index(index)]
            if not is_as_made(job.originals, job.recipe, index, row):
                raise UserError(
                    f"{job.folder}: holds another data set: image {index} of the source, which is "
                    f"prepared already, is another now; name another folder"
                )


def _check_place(folder: Path, source: str) -> None:
    """Raise UserError for a folder of other files, or one inside the source."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder to prepare the data in")
    if source != "synthetic" and Path(source).is_dir():
        inside = folder.resolve()
        if Path(source).resolve() in (inside, *inside.parents):
            raise UserError(f"{folder}: lies in the source {source}; name a folder elsewhere")
    if not folder.is_dir() or (folder / PROGRESS).is_dir():
        return
    others = sorted(each.name for each in folder.iterdir() if not is_leftover(each.name))
    if others:
        raise UserError(f"{folder}: holds other files ({', '.join(others[:3])}); name a new folder")


def _refuse_difference(there: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError, naming the settings that differ, unless they are those wanted."""
    differ = []
    for key, value in _flat(wanted):
        node: Any = there
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        # Begun by an earlier version.
        unknown = key in ("source.states", "source.spoken") and node is None
        if node == value or unknown or (key == "name" and value is None):
            continue
        if key in ("source.listing", "source.states", "source.spoken"):
            differ.append("the source's images are others now")
        else:
            differ.append(f"{key} is {node!r} there and {value!r} now")
    if differ:
        raise UserError(
            f"{folder}: holds another data set: {'; '.join(differ)}; name another folder"
        )


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


@contextmanager
def _claimed(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Lock a folder for one run with these settings.

    Raises:
        UserError: locked by another run, begun with other settings, or not writable.
    """
    progress = folder / PROGRESS
    noted = progress / _SETTINGS
    try:
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        progress.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    with locks.hold(progress / _LOCK, "preparing", folder):
        if any(progress.glob("*.npz")):
            _refuse_difference(_read_settings(noted), settings, folder)
        else:
            write_atomically(noted, lambda file: file.write(json.dumps(settings).encode()))
        _sweep(folder)
        try:
            yield
        finally:
            _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove unfinished files of a run that was killed; earlier versions wrote `.part`."""
    for place in (folder, folder / SHARDS, folder / PROGRESS, folder / TEXT):
        for part in (*place.glob(".*.tmp"), *place.glob("*.part")):
            part.unlink()


def _read_settings(noted: Path) -> dict[str, Any]:
    try:
        settings = json.loads(regular(noted).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{noted}: damaged ({error}); remove {noted.parents[1]} and begin again"
        ) from error
    return settings if isinstance(settings, dict) else {}
