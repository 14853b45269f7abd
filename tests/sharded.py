"""What the tests of shards share: small prepared sets of noise, and ways to spoil them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_pl.data.recipe import Recipe
from diffusion_pl.data.shard_format import PROGRESS, SHARDS, Manifest
from diffusion_pl.data.shards import Shards
from diffusion_pl.data.sources.base import Original, Originals
from diffusion_pl.data.write_shards import Job, finish, write_shard


def noise(index: int, side: int) -> np.ndarray:
    """Image `index` at one resolution."""
    source = np.random.default_rng([index, side])
    return source.integers(0, 256, (3, side, side), dtype=np.uint8)


@dataclass(frozen=True)
class Noise:
    """Reads noise by index."""

    sides: tuple[int, ...]

    def read(self, index: int) -> Original:
        return Original(f"noise {index}", {side: noise(index, side) for side in self.sides})


def pixels(indices: range, side: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([noise(index, side) for index in indices]))


def write(
    folder: Path,
    count: int = 20,
    sides: tuple[int, ...] = (16, 8),
    encoding: str = "png",
    shard_images: int = 6,
    labels: bool = True,
) -> Path:
    """A prepared set; image i has label i % 3."""
    numbers = np.arange(count, dtype=np.int32) % 3 if labels else None
    originals = Originals("noise", Noise(sides), count, "0" * 64, numbers, 3 if labels else 0)
    job = Job(folder, originals, Recipe(sides, "area", "crop", encoding, shard_images), "noise")
    (folder / SHARDS).mkdir(parents=True)
    (folder / PROGRESS).mkdir()
    for number in range(job.shards):
        write_shard(job, number, refuse, nothing)
    settings = {"name": "noise", "filter": "area", "fit": "crop", "source": {"path": "noise"}}
    finish(job, settings)
    return folder


def refuse(complaint: str) -> None:
    raise AssertionError(complaint)


def nothing() -> None:
    pass


def source(path: Path | str, resolution: int = 16, **settings: Any) -> Shards:
    return Shards(str(path), resolution, **settings)


def index_of(folder: Path) -> np.ndarray:
    return np.load(folder / "index.npy")


def damage(folder: Path, image: int, side: int, byte: int = 40) -> str:
    """Change a byte of a member where it lies; its shard's name."""
    row = index_of(folder)[image]
    name = f"shards/{row['shard']:06d}.tar"
    data = bytearray((folder / name).read_bytes())
    data[int(row[f"offset_{side}"]) + byte] ^= 0xFF
    (folder / name).write_bytes(data)
    return name


def reindex(folder: Path, change: Any) -> None:
    """Change the index, and `dataset.json` to go with it."""
    index = index_of(folder)
    change(index)
    np.save(folder / "index.npy", index)
    digest = hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest()
    rewrite(folder, index_sha256=digest)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change `dataset.json` as if it had been written so."""
    manifest = Manifest.read(folder)
    for name, value in changes.items():
        object.__setattr__(manifest, name, value)
    manifest.write(folder)


def edit(folder: Path, **changes: Any) -> None:
    """Change `dataset.json` behind its fingerprint's back."""
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
