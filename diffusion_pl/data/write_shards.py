"""Write the shards of a data set, each whole or not at all, then the index.

A shard gets its name when all of it is on the disk; its rows of the index lie in `.progress` until
the last shard is written, and so do its captions. A shard depends only on the originals and the
recipe, so the same command finishes a killed run to the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import webdataset.utils
from webdataset import TarWriter

from diffusion_pl.data.caption_files import write_captions
from diffusion_pl.data.depths import Depths
from diffusion_pl.data.fingerprint import fingerprint, image_digests
from diffusion_pl.data.labels import counts
from diffusion_pl.data.recipe import Recipe, versions
from diffusion_pl.data.shard_format import (
    ENDINGS,
    INDEX,
    PROGRESS,
    Manifest,
    Shard,
    index_dtype,
    key_of,
    shard_name,
)
from diffusion_pl.data.sources.base import Originals
from diffusion_pl.data.sources.captions import caption_notes, cleaned
from diffusion_pl.data.stored import CaptionFiles
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import aside, regular, write_atomically

# By default webdataset executes pickled members and `pipe:` addresses. We read nothing with it, and
# other code in this process shall not execute them either.
webdataset.utils.enforce_security = True


@dataclass(frozen=True)
class Job:
    """Everything that a shard depends on.

    Args:
        folder: of the data set.
        originals: of the source.
        recipe: resolutions, filter and encoding.
        where: names the source in error messages.
    """

    folder: Path
    originals: Originals
    recipe: Recipe
    where: str

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.originals.count // self.recipe.shard_images)

    def images(self, number: int) -> range:
        """Indices of the originals of a shard."""
        first = number * self.recipe.shard_images
        return range(first, min(first + self.recipe.shard_images, self.originals.count))


@dataclass(frozen=True)
class Written:
    """The record of a finished shard.

    Args:
        shard: its entry in the manifest.
        rows: its rows of the index.
        digests: uint8 (images, resolutions, 32), sha256 of the pixels.
        skipped: errors of the originals that were left out, by key.
        depths: range of its 16-bit originals.
        enlarged: sides in pixels of originals smaller than the largest resolution.
        captions: of each image.
        problems: how many captions were left out or changed, by kind.
    """

    shard: Shard
    rows: npt.NDArray[np.void]
    digests: npt.NDArray[np.uint8]
    skipped: dict[str, str]
    depths: Depths
    enlarged: list[int]
    captions: list[list[str]]
    problems: dict[str, int]


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)


def write_shard(
    job: Job, number: int, skip: Callable[[str], None], advance: Callable[[], None]
) -> None:
    """Write one shard, then its record.

    Args:
        job: of the data set.
        number: of the shard.
        skip: called with the error of each original that cannot be read; raises if too many.
        advance: called after each original.

    Raises:
        UserError: an original that is not skipped, or a disk that is full.
    """
    path = job.folder / shard_name(number)
    contents = _Contents(job, skip, advance)
    with aside(path) as part:
        with part.open("wb") as file:
            hashed = _Hashed(file)
            # No user, group or time: the same bytes everywhere.
            with TarWriter(hashed, encoder=False, user="", group="", mtime=0) as tar:
                for sample in contents.samples(number):
                    tar.write(sample)
        rows = np.array(contents.rows, dtype=index_dtype(job.recipe.descending))
        _locate(rows, part, contents.keys, job.recipe)
    entry = Shard(shard_name(number), len(rows), hashed.size, hashed.digest.hexdigest())
    _note(job.folder, number, entry, rows, contents)


class _Contents:
    """The samples of a shard, and their rows of the index."""

    def __init__(self, job: Job, skip: Callable[[str], None], advance: Callable[[], None]) -> None:
        self.job, self.skip, self.advance = job, skip, advance
        self.keys: list[str] = []
        self.rows: list[tuple[int, ...]] = []
        self.digests: list[bytes] = []
        self.skipped: dict[str, str] = {}
        self.depths = Depths()
        self.enlarged: list[int] = []
        self.captions: list[list[str]] = []
        self.problems: Counter[str] = Counter()

    def samples(self, number: int) -> Iterator[dict[str, str | bytes]]:
        """The originals of a shard as samples of webdataset's writer."""
        for index in self.job.images(number):
            sample = self._sample(number, index)
            if sample is not None:
                yield sample
            self.advance()

    def _sample(self, number: int, index: int) -> dict[str, str | bytes] | None:
        originals, recipe = self.job.originals, self.job.recipe
        key = key_of(index)
        try:
            original = originals.reader.read(index)
            where = f"{self.job.where}/{original.name}"
            squares, size = recipe.squares(original, where=where, depths=self.depths)
            spoken = originals.captions.reader.read(index) if originals.captions else []
        except ValueError as error:
            self.skip(str(error))
            self.skipped[key] = str(error)
            return None
        if (side := recipe.side_of(size)) < recipe.descending[0]:
            self.enlarged.append(side)
        label = -1 if originals.labels is None else int(originals.labels[index])
        row = [number, label]
        members: dict[str, str | bytes] = {"__key__": key}
        for side, pixels in squares.items():
            data, decoded = recipe.encoded(pixels)
            members[f"{side}.{ENDINGS[recipe.encoding]}"] = data
            row += [0, len(data), zlib.crc32(data)]
            self.digests.append(image_digests(decoded[None]))
        if label >= 0:
            members["cls"] = str(label).encode()
        about: dict[str, Any] = {"name": original.name, "size": size}
        self.captions.append(cleaned(spoken, self.problems))
        about |= {"captions": self.captions[-1]} if self.captions[-1] else {}
        members["json"] = json.dumps(about, ensure_ascii=True).encode()
        self.keys.append(key)
        self.rows.append(tuple(row))
        return members


def _locate(rows: npt.NDArray[np.void], tar: Path, keys: list[str], recipe: Recipe) -> None:
    """Fill in the offset of each image in the tar."""
    places = {key: row for row, key in enumerate(keys)}
    sides = {f"{side}.{ENDINGS[recipe.encoding]}": side for side in recipe.resolutions}
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            key, _, ending = member.name.partition(".")
            if ending in sides:
                rows[f"offset_{sides[ending]}"][places[key]] = member.offset_data


def _sidecar(folder: Path, number: int) -> Path:
    return folder / PROGRESS / f"{number:06d}.npz"


def _note(
    folder: Path, number: int, shard: Shard, rows: npt.NDArray[np.void], contents: _Contents
) -> None:
    depths = contents.depths.__getstate__()
    noted: dict[str, Any] = {"shard": shard.__dict__, "skipped": contents.skipped}
    noted |= {"depths": depths, "enlarged": contents.enlarged}
    if contents.job.originals.captions:
        noted |= {"captions": contents.captions, "problems": contents.problems}
    about, digests = json.dumps(noted).encode(), b"".join(contents.digests)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        rows=rows,
        digests=np.frombuffer(digests, np.uint8),
        about=np.frombuffer(about, np.uint8),
    )
    write_atomically(_sidecar(folder, number), lambda file: file.write(buffer.getvalue()))


def read_written(job: Job, number: int) -> Written | None:
    """The record of a shard that an earlier run finished; None for an unfinished one."""
    try:
        with np.load(regular(_sidecar(job.folder, number)), allow_pickle=False) as noted:
            about: dict[str, Any] = json.loads(noted["about"].tobytes())
            rows, digests = noted["rows"], noted["digests"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None  # absent, or truncated by a power cut: written again
    if ("captions" in about) != (job.originals.captions is not None):
        return None  # by a version that did not read them
    shard = Shard(**about["shard"])
    path = job.folder / shard.file
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return None
    sides = len(job.recipe.resolutions)
    depths = Depths(**about.get("depths", {}))
    digests, enlarged = digests.reshape(len(rows), sides, 32), about.get("enlarged", [])
    captions = about.get("captions", []), about.get("problems", {})
    return Written(shard, rows, digests, about["skipped"], depths, enlarged, *captions)


def finish(job: Job, settings: Mapping[str, Any]) -> Manifest:
    """Write the index and `dataset.json` from the records of all shards.

    Args:
        job: of the data set; every shard is written.
        settings: name, filter, fit and source of the manifest.

    Raises:
        UserError: no image is left, or the disk is full.
    """
    parts = [read_written(job, number) for number in range(job.shards)]
    shards = [part for part in parts if part is not None]
    assert len(shards) == job.shards
    rows = np.concatenate([part.rows for part in shards])
    digests = np.concatenate([part.digests for part in shards])
    if not len(rows):
        raise UserError(f"{job.where}: every image was skipped; nothing is left")
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    originals, recipe = job.originals, job.recipe
    labels = None if originals.labels is None else rows["label"]
    depths = Depths()
    for part in shards:
        depths.add(part.depths)
    small = enlarged([side for part in shards for side in part.enlarged], recipe.descending[0])
    captions, said = _write_captions(job, shards)
    notes = [*originals.notes, *said, *(line for line in (depths.line(), small) if line)]
    manifest = Manifest(
        name=settings["name"],
        count=len(rows),
        classes=originals.classes,
        class_names=originals.class_names,
        channels=recipe.channels,
        resolutions=recipe.descending,
        encoding=recipe.encoding,
        filter=settings["filter"],
        fit=settings["fit"],
        shard_images=recipe.shard_images,
        source=settings["source"],
        shards=[part.shard for part in shards],
        fingerprints={
            side: fingerprint(
                digests[:, place].tobytes(), (len(rows), recipe.channels, side, side), labels
            )
            for place, side in enumerate(recipe.descending)
        },
        index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        skipped={key: text for part in shards for key, text in part.skipped.items()},
        notes=notes or None,
        class_counts=None if labels is None else counts(labels.tolist(), originals.classes),
        labels_from=originals.labels_from or None,
        unread=originals.unread or None,
        captions=captions,
        versions=versions(),
    )
    write_atomically(job.folder / INDEX, lambda file: file.write(buffer.getvalue()))
    manifest.write(job.folder)
    shutil.rmtree(job.folder / PROGRESS)
    return manifest


def _write_captions(job: Job, shards: Sequence[Written]) -> tuple[CaptionFiles | None, list[str]]:
    """Write the captions of all shards; also returns notes on them."""
    if job.originals.captions is None:
        return None, []
    captions = [each for part in shards for each in part.captions]
    problems: Counter[str] = Counter()
    for part in shards:
        problems.update(part.problems)
    written = write_captions(job.folder, captions, job.originals.captions.origin)
    bare = sum(not each for each in captions)
    return written, caption_notes(problems, bare, len(captions))


def enlarged(sides: Sequence[int], wanted: int) -> str | None:
    """A warning on originals of these sides (pixels), smaller than `wanted`; None for none."""
    if not sides:
        return None
    images = "1 image was" if len(sides) == 1 else f"{len(sides):,} images were"
    return (
        f"{images} smaller than {wanted} px (the smallest {min(sides)}) and enlarged, which makes "
        f"them blurred; leave them out, or prepare at a lower resolution, unless that is meant"
    )
