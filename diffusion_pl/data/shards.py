"""Data sets that `prepare` has written, in a folder or at an address."""

from __future__ import annotations

import os
import tempfile
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from diffusion_pl.data.dataset import load
from diffusion_pl.data.prepare import Request, prepare
from diffusion_pl.data.shard_format import (
    INDEX,
    LARGEST_MANIFEST,
    MANIFEST,
    PROGRESS,
    SHARDS,
    Manifest,
    index_bytes,
)
from diffusion_pl.data.shard_images import ShardImages
from diffusion_pl.data.shard_texts import chosen, open_texts
from diffusion_pl.data.stored import Encoding
from diffusion_pl.data.tars import Tars
from diffusion_pl.errors import UserError
from diffusion_pl.io import cache as remote
from diffusion_pl.io.files import nearest, regular, sha256_of
from diffusion_pl.progress import reported

_SETS = "sets"


@dataclass(frozen=True)
class Shards:
    """A prepared data set; a step reads only the resolution it trains at.

    Args:
        path: the folder that `prepare` made, or its address, such as s3://bucket/cats (any that
            fsspec knows); remote shards are fetched when they are needed.
        resolution: side in pixels of the full frame; one that was prepared.
        channels: colour channels: 1, 3 or 4.
        cache: `disk` reads an image when it is needed; `memory` decodes all on opening.
        cache_folder: for remote shards.
        cache_bytes: most bytes in it, over all processes of the machine.
        window: shards shuffled together, 0: all; of a remote set so many are on the disk.
        skip_broken: how many broken images a process may replace, each by the next good one of the
            same label.
        made_of: what to prepare at `path` if nothing is there; None: `path` must be there.
        text: the encoder of which token states are read with the images, or `auto` for the only
            one there is; None reads none.
    """

    path: str
    resolution: int
    _: KW_ONLY
    channels: int = 3
    cache: Literal["disk", "memory"] = "disk"
    cache_folder: str = "data/cache"
    cache_bytes: int = 64 * 1024**3
    window: int = 1024
    skip_broken: int = 0
    made_of: Request | None = None
    text: str | None = None

    def prepare(self) -> None:
        """Prepare `made_of`, check `dataset.json`, and fetch the index of a remote set.

        Raises:
            UserError: not prepared, unfinished, of another format, or without what is asked for.
            WorkerLost: a process that prepared was killed.
        """
        if self.made_of is not None:
            with reported() as report:
                workers = os.cpu_count() or 1
                prepare(self.made_of, Path(self.path), workers=workers, report=report, relist=False)
        _, manifest = self._described()
        self._encoding(manifest)

    def open(self, resolution: int | None = None) -> ShardImages:
        """The images at one of the prepared resolutions.

        The index is checked against its digest and the shards against their sizes; every image is
        checked when it is read.

        Args:
            resolution: of the images, its own when not given.

        Raises:
            UserError: as `prepare`, or an index or shards other than those described.
        """
        resolution = resolution or self.resolution
        folder, manifest = self._described()
        self.check_resolution(manifest, resolution)
        cache = self._cache()
        tars = Tars(self.path, manifest, cache)
        images = ShardImages(tars, folder, resolution, self.window, self.skip_broken)
        images.labels = self._check_index(images, manifest)
        if encoding := self._encoding(manifest):
            images.texts = open_texts(self.path, folder, manifest, encoding, cache)
        if self.cache == "memory":
            images.decoded = self._decoded(images)
        return images

    def _encoding(self, manifest: Manifest) -> Encoding | None:
        """The token states that are read, if any."""
        if self.text is None:
            return None
        cache = self._cache()
        encoding = chosen(self.path, manifest, self.text, cache)
        if cache is not None:
            self._check_room(manifest, sum(block.bytes for block in encoding.blocks))
        return encoding

    def _cache(self) -> remote.Cache | None:
        """Of a remote set."""
        if not remote.is_remote(self.path):
            return None
        return remote.Cache(Path(self.cache_folder), self.cache_bytes)

    def _described(self) -> tuple[Path, Manifest]:
        """The folder of the index, and the manifest, checked against the settings."""
        if self.cache not in ("disk", "memory"):
            raise UserError(f"data.dataset.cache is disk or memory (got {self.cache!r})")
        for name, value in (("window", self.window), ("skip_broken", self.skip_broken)):
            if value < 0:
                raise UserError(f"data.dataset.{name} must be at least 0 (got {value})")
        folder, manifest = self._remote() if remote.is_remote(self.path) else self._local()
        self.check_resolution(manifest, self.resolution)
        if manifest.channels != self.channels:
            raise UserError(
                f"{self.path}: images of {manifest.channels} channels; set "
                f"data.dataset.channels={manifest.channels}"
            )
        return folder, manifest

    def _local(self) -> tuple[Path, Manifest]:
        folder = Path(self.path)
        if not (folder / MANIFEST).exists():
            begun = (folder / PROGRESS).is_dir() or (folder / SHARDS).is_dir()
            raise UserError(
                f"{self.path}: `prepare` was interrupted here; run it again to finish"
                if begun
                else _not_prepared(self.path)
            )
        return folder, Manifest.read(folder)

    def _remote(self) -> tuple[Path, Manifest]:
        """Fetch `dataset.json`, each time, since it may change, and the index."""
        address = self.path.rstrip("/")
        text = remote.read(f"{address}/{MANIFEST}", LARGEST_MANIFEST)
        if text is None:
            raise UserError(_not_prepared(self.path))
        sets = Path(self.cache_folder) / _SETS
        sets.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=sets) as name:
            (Path(name) / MANIFEST).write_bytes(text)
            try:
                manifest = Manifest.read(Path(name))
            except ValueError as error:
                raise UserError(str(error).replace(name, address)) from error
        folder = sets / manifest.index_sha256
        size = index_bytes(manifest)
        cache = remote.Cache(folder, size)
        if cache.has(INDEX, size):
            cache.drop_damaged(INDEX, manifest.index_sha256)
        cache.fetch(f"{address}/{INDEX}", INDEX, size, manifest.index_sha256)
        self._check_room(manifest)
        return folder, manifest

    def _check_room(self, manifest: Manifest, more: int = 0) -> None:
        sizes = sorted((shard.bytes for shard in manifest.shards), reverse=True)
        most = sum(sizes[: self.window or None]) + more
        if most > self.cache_bytes:
            texts = " and the texts" if more else ""
            raise UserError(
                f"{self.path}: data.dataset.cache_bytes is {self.cache_bytes:,}, and the shards "
                f"that are shuffled together{texts} take {most:,}; raise it or lower "
                f"data.dataset.window"
            )

    def check_resolution(self, manifest: Manifest, resolution: int) -> None:
        """Raise UserError unless images were prepared at a resolution."""
        if resolution not in manifest.resolutions:
            there = ", ".join(map(str, manifest.resolutions))
            raise UserError(
                f"{self.path}: prepared at {there} px (got {resolution}); choose among these, or "
                f"prepare the data with --resolutions {resolution}"
            )

    def _check_index(self, images: ShardImages, manifest: Manifest) -> torch.Tensor | None:
        """Check the index and the sizes of local shards against the manifest; return the labels."""
        index = images.folder / INDEX
        images.index  # noqa: B018 - an absent or foreign index is told first
        if sha256_of(index) != manifest.index_sha256:
            raise UserError(f"{index}: changed since the data was prepared; prepare it again")
        if images.tars.cache is None:
            for number, shard in enumerate(manifest.shards):
                _check_size(images.tars.name(number), shard.bytes)
        counts = [shard.count for shard in manifest.shards]
        if not np.array_equal(images.index["shard"], np.repeat(np.arange(len(counts)), counts)):
            raise UserError(f"{index}: not in the order of the shards; prepare the data again")
        if manifest.classes == 0:
            return None
        labels = images.index["label"].astype(np.int64)
        if labels.min() < 0 or labels.max() >= manifest.classes:
            raise UserError(f"{index}: labels beyond the {manifest.classes} classes")
        return torch.from_numpy(labels)

    def _decoded(self, images: ShardImages) -> torch.Tensor:
        """Decode all images, and check their fingerprint."""
        needed = len(images) * images.channels * images.resolution**2
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > there:
            raise UserError(
                f"{self.path}: {needed / 2**30:.0f} GiB decoded do not fit in the "
                f"{there / 2**30:.0f} GiB of memory; set data.dataset.cache=disk"
            )
        loaded = load(images.name, images, images.labels, limit=needed)
        if loaded.fingerprint != images.fingerprint and not images.broken:
            raise UserError(
                f"{self.path}: the images at {images.resolution} px decode to others than were "
                f"prepared; prepare the data again, with the decoders that are here"
            )
        assert isinstance(loaded.store, torch.Tensor)
        return loaded.store


def _not_prepared(path: str) -> str:
    near = nearest(Path(path)) if not remote.is_remote(path) else None
    beside = "" if near is None else f", but {near} is there"
    return (
        f"{path}: not prepared (no {MANIFEST} here{beside}); run python -m diffusion_pl prepare "
        f"SOURCE {path} --resolutions ..."
    )


def _check_size(path: str, size: int) -> None:
    try:
        found = regular(Path(path)).stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); prepare it again") from error
    if found != size:
        raise UserError(
            f"{path}: {found:,} bytes where {size:,} were written; fetch or prepare the data again"
        )
