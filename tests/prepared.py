"""What the tests of `prepare` share: image files, sources of every kind, running the command."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_pl import cli


def noise(seed: int, width: int = 8, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def files(count: int, width: int = 8, height: int = 8) -> dict[str, bytes]:
    """Images of noise in two folders."""
    return {f"{'ab'[i % 2]}/{i:03}.png": file(noise(i, width, height)) for i in range(count)}


def fill(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zipped(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def cifar10(path: Path, count: int = 3) -> Path:
    """An archive in the layout of the published one, `count` images a file."""
    draw = np.random.default_rng(0)
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
            labels = draw.integers(0, 10, count).tolist()
            data = draw.integers(0, 256, (count, 3072), dtype=np.uint8)
            batch = pickle.dumps({b"labels": labels, b"data": data}, 2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(batch)
            archive.addfile(info, io.BytesIO(batch))
    return path


def prepare(source: object, dest: Path, *words: object, resolutions: str = "8") -> int:
    arguments = ["prepare", str(source), str(dest), "--resolutions", resolutions]
    return cli.main([*arguments, *map(str, words)])


def manifest(dest: Path) -> dict[str, Any]:
    return json.loads((dest / "dataset.json").read_bytes())


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    }


def pixels(data: bytes) -> np.ndarray:
    """(3, H, W) of an image file's or an array file's bytes."""
    if data.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(data))
    return np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)


def members(dest: Path) -> dict[str, bytes]:
    """Everything in the shards, by name."""
    found = {}
    for path in sorted((dest / "shards").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None
                found[member.name] = stream.read()
    return found
