"""Images a second out of prepared shards, beside the readers one would otherwise use.

All read the same bytes: the members of the shards are also laid out as the folder that
torchvision's ImageFolder reads, and webdataset reads the very tars. Everyone has two workers,
batches of 64 in bytes (but ImageFolder with ToTensor), and one torch thread in the consumer,
without which it takes time from its workers. A reader is timed from its ninth batch, when its
workers are at work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

from benchmarks.measure import median, record
from diffusion_pl import cli
from diffusion_pl.data.dataset import _Reduced
from diffusion_pl.data.loader import DataConfig, Loader
from diffusion_pl.data.means import block_means
from diffusion_pl.data.member_images import decode_into
from diffusion_pl.data.shard_format import INDEX, SHARDS, Manifest, Shard
from diffusion_pl.data.shards import Shards
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.images import Images

BATCH = 64
WORKERS = 2
ROUNDS = 5
WARM = 8
SMALL, LARGE = 4000, 400  # images of 32 and of 256 px
EPOCHS = 4

Batch = Any
Case = Callable[[], Iterable[Batch]]


def rate(batches: Iterable[Batch], length: Callable[[Batch], int]) -> float:
    """Images a second after the warm-up."""
    images, started = 0, 0.0
    for number, batch in enumerate(batches):
        if number == WARM:
            started = time.perf_counter()
        elif number > WARM:
            images += length(batch)
    return images / (time.perf_counter() - started)


def rates(cases: dict[str, Case], warm_up: bool = True) -> dict[str, int]:
    """Medians over rounds in which the cases take turns."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(ROUNDS + warm_up):
        for name, case in cases.items():
            measured = rate(case(), _length)
            if turn >= warm_up:
                found[name].append(measured)
    return {name: round(median(values)) for name, values in found.items()}


def _length(batch: Batch) -> int:
    image = batch["image"] if isinstance(batch, dict) else batch[0]
    return len(image)


# The readers.


def ours(images: Images, workers: int = WORKERS, batch: int = BATCH) -> Iterator[Batch]:
    """What a run reads."""
    nothing = Synthetic(1, 8)  # the images are opened already
    data = DataConfig(nothing, batch_size=batch, num_workers=workers)
    return iter(Loader(data, {images.resolution: images}, 0, EPOCHS * len(images) // batch))


def reduced(images: Images, side: int) -> Images:
    """Images that are decoded whole and reduced when they are read."""
    store = _Reduced(images, side)
    return Images("reduced", store, "", images.labels, images.classes, shards=images.shards)


def _small(side: int, floats: bool, image: Image.Image) -> torch.Tensor:
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BOX)
    return functional.to_tensor(image) if floats else functional.pil_to_tensor(image)


def folder(path: Path, side: int, floats: bool = True) -> Iterator[Batch]:
    """torchvision's ImageFolder, with ToTensor as everyone has it, or handing over bytes."""
    data = ImageFolder(str(path), partial(_small, side, floats))
    epochs: Dataset = ConcatDataset([data] * EPOCHS)
    return iter(DataLoader(epochs, BATCH, shuffle=True, num_workers=WORKERS))


def _decoded(side: int, ending: str, whole: int, sample: dict[str, bytes]) -> tuple[Any, int]:
    image = np.empty((3, whole, whole), np.uint8)
    data = sample[f"{whole}.{ending}"]
    if ending == "npy":
        image[:] = np.frombuffer(data, np.uint8, offset=128).reshape(image.shape)
    else:
        decode_into(image, data, {"png": "png", "jpg": "jpeg"}[ending])
    if side != whole:
        image = block_means(torch.from_numpy(image)[None], side)[0].numpy()
    return image, int(sample["cls"])


def tars(path: Path, side: int, ending: str, whole: int) -> Iterator[Batch]:
    """webdataset's reader, with our decoder."""
    urls = sorted(map(str, (path / SHARDS).glob("*.tar")))
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
    data = data.shuffle(1000).map(partial(_decoded, side, ending, whole)).batched(BATCH)
    return iter(DataLoader(data.repeat(EPOCHS), batch_size=None, num_workers=WORKERS))


class _Mapped(Dataset):
    """Decoded images in one file, mapped."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.pixels = np.memmap(path, np.uint8, "r", shape=shape)
        self.order = np.random.default_rng(0).permutation(len(self.pixels))

    def __getitem__(self, step: int) -> tuple[torch.Tensor]:
        first = step * BATCH % (len(self.order) - BATCH)
        return (torch.from_numpy(self.pixels[self.order[first : first + BATCH]]),)


def mapped(path: Path, shape: tuple[int, ...]) -> Iterator[Batch]:
    """A raw memory map, the least there is to do."""
    steps = range(EPOCHS * shape[0] // BATCH)
    data = _Mapped(path, shape)
    return iter(DataLoader(data, batch_size=None, sampler=steps, num_workers=WORKERS))


# The data.


def write_photos(path: Path, count: int, side: int, form: str, **options: Any) -> Path:
    """A folder of synthetic images with the noise of a photograph, in classes."""
    images = Synthetic(count, side).open()
    source = np.random.default_rng(0)
    for number in range(count):
        image = images.read(torch.tensor([number]))[0].numpy().transpose(1, 2, 0)
        grain = np.rint(source.normal(0, 4, image.shape))
        rough = np.clip(image + grain, 0, 255).astype(np.uint8)
        place = path / str(number % 5)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rough).save(place / f"{number:05}.{form}", **options)
    return path


def prepared(source: Path, path: Path, resolutions: str, encoding: str, shard: int) -> Path:
    """Shards of a folder of images."""
    words = ["prepare", source, path, "--labels", "--resolutions", resolutions]
    words += ["--encoding", encoding, "--shard-images", shard, "--filter", "area"]
    assert cli.main(list(map(str, words))) == 0
    return path


def laid_out(shards: Path, path: Path, ending: str) -> Path:
    """The members of the shards as a folder of classes."""
    for tar in sorted((shards / SHARDS).glob("*.tar")):
        with tarfile.open(tar) as archive:
            found = {member.name: archive.extractfile(member) for member in archive}
            for name, file in found.items():
                key = name.partition(".")[0]
                label = found[f"{key}.cls"]
                if name.endswith(ending) and file is not None and label is not None:
                    label.seek(0)
                    place = path / label.read().decode()
                    place.mkdir(parents=True, exist_ok=True)
                    (place / f"{key}.{ending}").write_bytes(file.read())
    return path


# The measurements.


def small(work: Path) -> dict[str, Any]:
    """32 px: PNG and raw shards, mapped and in memory."""
    source = write_photos(work / "small", SMALL, 32, "png")
    png = prepared(source, work / "png", "32", "png", 500)
    raw = prepared(source, work / "raw", "32", "raw", 500)
    files = laid_out(png, work / "small_files", "png")
    memory = Shards(str(png), 32, cache="memory").open()
    assert memory.decoded is not None
    memory.decoded.numpy().tofile(work / "pixels")
    found = rates(
        {
            "shards, PNG": lambda: ours(Shards(str(png), 32).open()),
            "ImageFolder": lambda: folder(files, 32),
            "ImageFolder, bytes": lambda: folder(files, 32, floats=False),
            "webdataset, same decoder": lambda: tars(png, 32, "png", 32),
            "shards, raw": lambda: ours(Shards(str(raw), 32).open()),
            "webdataset, raw": lambda: tars(raw, 32, "npy", 32),
            "memory map": lambda: mapped(work / "pixels", memory.shape),
            "shards in memory, no workers, 64 a batch": lambda: ours(memory, 0),
            "shards in memory, no workers, 512 a batch": lambda: ours(memory, 0, 512),
        }
    )
    png_rate, other = found["shards, PNG"], found["ImageFolder"]
    return {
        "images a second": found,
        "PNG shards / ImageFolder": round(png_rate / other, 2),
        "PNG shards / webdataset": round(png_rate / found["webdataset, same decoder"], 2),
        "raw shards / ImageFolder": round(found["shards, raw"] / other, 2),
        "resident after 1 and 3 epochs of PNG, MiB": epochs(png),
    }


def large(work: Path) -> dict[str, Any]:
    """256 px JPEG for a model of 64."""
    source = write_photos(work / "large", LARGE, 256, "jpg", quality=95, subsampling=0)
    both = prepared(source, work / "both", "256,64", "jpeg", 100)
    files = laid_out(both, work / "large_files", "256.jpg")
    data = Shards(str(both), 256)
    found = rates(
        {
            "shards, 256 reduced to 64": lambda: ours(reduced(data.open(), 64)),
            "shards, 64 as stored": lambda: ours(data.open(64)),
            "ImageFolder, 256 reduced to 64": lambda: folder(files, 64),
            "webdataset, same decoder and means": lambda: tars(both, 64, "jpg", 256),
            "ImageFolder, bytes": lambda: folder(files, 64, floats=False),
        }
    )
    whole, stored, other, peer, _ = found.values()
    return {
        "images a second": found,
        "reduced / ImageFolder": round(whole / other, 2),
        "reduced / webdataset": round(whole / peer, 2),
        "stored / ImageFolder": round(stored / other, 2),
    }


_EPOCHS = """
import sys, torch
from pathlib import Path
from diffusion_pl.data.shards import Shards
images = Shards(sys.argv[1], 32).open()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
for epoch in range(3):
    for part in torch.randperm(len(images)).split(64):
        images.read(part)
    print(round(resident(), 1))
"""


def epochs(path: Path) -> list[float]:
    """Resident memory of a process that reads three epochs, after the first and the last."""
    command = [sys.executable, "-c", _EPOCHS, str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return [float(lines[0]), float(lines[-1])]


_GROWTH = """
import json, sys, time, torch
torch.set_num_threads(1)
from pathlib import Path
from diffusion_pl.data.loader import DataConfig, Loader
from diffusion_pl.data.shards import Shards
def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024
before, started = own(), time.perf_counter()
data = DataConfig(Shards(sys.argv[1], 8, window=64), batch_size=64)
images = data.dataset.open()
batches = Loader(data, {8: images}, 0, 1000)
batches[0]
first = time.perf_counter() - started
for step in range(1, 200):
    batches[step]
times = []
for turn in range(5):
    started = time.perf_counter()
    for step in range(200 * turn, 200 * turn + 200):
        batches[step]
    times.append((time.perf_counter() - started) / 200)
print(json.dumps({
    "images": len(images),
    "seconds to the first batch": round(first, 2),
    "us a batch": round(sorted(times)[2] * 1e6),
    "own memory, MiB more": round(own() - before, 1),
}))
"""


def growth(work: Path) -> list[dict[str, Any]]:
    """The same with indices of a thousand to ten million images: one shard under many names."""
    source = write_photos(work / "tiny", 1000, 8, "png")
    one = prepared(source, work / "one", "8", "raw", 1000)
    found = []
    for count in (1, 100, 10_000):
        command = [sys.executable, "-c", _GROWTH, str(grown(one, work / f"grown{count}", count))]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    return found


def grown(one: Path, path: Path, count: int) -> Path:
    """A set of one shard as one of `count` shards, all the same file under many names."""
    first, rows = Manifest.read(one), np.load(one / INDEX)
    (path / SHARDS).mkdir(parents=True)
    shards = []
    for number in range(count):
        name = f"{SHARDS}/{number:06d}.tar"
        os.link(one / first.shards[0].file, path / name)
        shards.append(Shard(**asdict(first.shards[0]) | {"file": name}))
    index = np.tile(rows, count)
    index["shard"] = np.repeat(np.arange(count), len(rows))
    np.save(path / INDEX, index)
    del index
    digest = subprocess.run(["sha256sum", path / INDEX], check=True, capture_output=True)
    content = {name: getattr(first, name) for name in asdict(first)}
    content |= {"count": len(rows) * count, "shards": shards}
    content |= {"index_sha256": digest.stdout.decode().split()[0]}
    Manifest(**content).write(path)
    return path


def main() -> None:
    """Measure in turns and record."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        figures = {
            "workers": WORKERS,
            "batch": BATCH,
            "32 px": small(work),
            "256 px JPEG to 64": large(work),
            "growth": growth(work),
        }
    record("data", figures)


if __name__ == "__main__":
    main()
