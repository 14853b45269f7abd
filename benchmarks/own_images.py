"""`recipe` on three data sets of different kind, beside the nearest shipped experiment.

photographs   CIFAR-10 or the part of it under data/cifar10
drawings      black strokes and outlines on white
scans         16-bit greyscale of a synthetic scanner: a body of ellipses that is not symmetric,
              a field that drifts, grain

Each is prepared, `recipe` writes its experiment, and three seeds of it are trained beside the
experiment that `prepare` names, cifar10_small, with the data's size, channels and classes and the
same budget. Both have one network and one batch, so an image costs the same; the time is recorded.
The distances are over the embedded features and over pixels, from the images that the run samples.

    make bench BENCH=own_images
    .venv/bin/python -m benchmarks.own_images --only scans --hours 0.05
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from benchmarks.measure import command, hardware
from diffusion_pl.commands import recommend
from diffusion_pl.data.shard_format import Manifest
from diffusion_pl.evaluation.provenance import commit
from diffusion_pl.training.history import History

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "results" / "own_images.json"
HOME = ROOT / "runs" / "own_images"
SEEDS = (0, 1, 2)
COUNT, SIDE = 4000, 32


def drawing(draw: np.random.Generator) -> Image.Image:
    """A sheet with one to four strokes or outlines, drawn four times as large."""
    large = 4 * SIDE
    sheet = Image.new("L", (large, large), 255)
    pen = ImageDraw.Draw(sheet)
    for _ in range(draw.integers(1, 5)):
        width = int(draw.integers(4, 9))
        kind = draw.integers(3)
        if kind == 0:
            a, b, c = draw.uniform(0, large, (3, 2))
            t = np.linspace(0, 1, 24)[:, None]
            curve = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
            pen.line([tuple(map(float, p)) for p in curve], fill=0, width=width, joint="curve")
        else:
            x, y = draw.uniform(0, large * 0.6, 2)
            w, h = draw.uniform(large * 0.2, large * 0.4, 2)
            (pen.ellipse if kind == 1 else pen.rectangle)(
                (x, y, x + w, y + h), outline=0, width=width
            )
    return sheet.resize((SIDE, SIDE), Image.Resampling.BOX)


def scan(draw: np.random.Generator) -> Image.Image:
    """A slice: body, a large organ on the left, smaller ones, a drift and grain; 16 bits."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    found: npt.NDArray[np.float64] = np.full((SIDE, SIDE), 0.02)

    def organ(cx: float, cy: float, rx: float, ry: float, value: float) -> None:
        turn = draw.uniform(-0.3, 0.3)
        u = (x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)
        v = (y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)
        edge = (1 - np.sqrt((u / rx) ** 2 + (v / ry) ** 2)) * 12
        share = 1 / (1 + np.exp(-np.clip(edge, -30, 30)))
        found[:] = found * (1 - share) + value * share

    organ(0, 0, draw.uniform(0.75, 0.9), draw.uniform(0.55, 0.75), draw.uniform(0.22, 0.28))
    organ(-0.35, draw.uniform(-0.15, 0.1), draw.uniform(0.25, 0.38), draw.uniform(0.2, 0.35), 0.36)
    organ(0.4, draw.uniform(-0.2, 0.1), draw.uniform(0.1, 0.18), draw.uniform(0.12, 0.2), 0.31)
    organ(draw.uniform(-0.06, 0.06), 0.42, 0.1, 0.12, draw.uniform(0.6, 0.8))  # spine
    for _ in range(draw.integers(0, 3)):
        organ(*draw.uniform(-0.45, 0.45, 2), *draw.uniform(0.04, 0.1, 2), draw.uniform(0.1, 0.5))
    drift = 1 + 0.12 * (x * draw.normal() + y * draw.normal())
    found = found * drift + draw.normal(0, 0.008, found.shape)
    return Image.fromarray((np.clip(found, 0, 1) * 65535).astype(np.uint16))


def made(name: str, make: Callable[[np.random.Generator], Image.Image]) -> Path:
    """A folder of images, drawn from their number."""
    folder = HOME / f"{name}-pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(COUNT):
        path = folder / f"{number:05d}.png"
        if not path.exists():
            make(np.random.default_rng((7, number))).save(path)
    return folder


def photographs() -> Path:
    """CIFAR-10's archive."""
    return ROOT / "data" / "cifar10" / "cifar-10-python.tar.gz"


SETS: dict[str, tuple[Callable[[], Path], list[str]]] = {
    "photographs": (photographs, ["--labels"]),
    "drawings": (lambda: made("drawings", drawing), ["--channels", "1"]),
    "scans": (lambda: made("scans", scan), ["--channels", "1"]),
}


def train(experiment: str, run: Path, words: list[str]) -> dict[str, Any]:
    """Train to the end; its distances and its time."""
    words = [*words, "evaluation.every=1_000_000_000", "evaluation.losses=null"]
    cores = os.cpu_count() or 1
    _, wall, cpu = command("train", experiment, *words, "--run", str(run), threads=cores)
    rows = History(run / "metrics.jsonl").rows()
    end = next(row for row in reversed(rows) if str(row.get("name", "")).startswith("fd@"))
    more = ["--features", "pixels", "--metrics", "frechet", "--json"]
    said, _, _ = command("evaluate", str(run), *more, threads=cores)
    return {
        "images": end["images"],
        "name": end["name"],
        "shapes": end["value"],
        "pixels": json.loads(said)["measures"][0]["value"],
        "seconds": round(wall),
        "cpu_seconds": round(cpu),
        "commit": commit(),
    }


def measured(
    name: str, hours: float, known: list[dict[str, Any]], write: Callable[[], None]
) -> None:
    """Every run of a data set that is not yet recorded."""
    make, words = SETS[name]
    data, written = HOME / name, HOME / f"{name}.yaml"
    if not (data / "dataset.json").exists():
        command("prepare", str(make()), str(data), "--resolutions", str(SIDE), *words)
    if not written.exists():
        cores = os.cpu_count() or 1
        probe = ["--run", str(HOME / f"{name}-probe"), "--out", str(written)]
        command("recipe", str(data), "--hours", str(hours), *probe, threads=cores)
    images = next(
        int(line.split()[1]) for line in written.read_text().splitlines() if "total_images:" in line
    )
    manifest = Manifest.read(data)
    plan = recommend.small(manifest, data, recommend.machine())
    shipped = [*plan.overrides, *recommend.of_budget(images, manifest.count)]
    for seed in SEEDS:
        for kind, experiment, more in (
            ("recipe", str(written), []),
            ("shipped", recommend.SMALL, shipped),
        ):
            about = {"set": name, "kind": kind, "seed": seed}
            if not any(about.items() <= row.items() for row in known):
                run = HOME / f"{name}-{kind}-{seed}"
                known.append({**about, **train(experiment, run, [*more, f"seed={seed}"])})
                write()


def main() -> None:
    """Measure what is asked for and write the record."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", choices=list(SETS))
    options.add_argument("--hours", type=float, default=0.06, help="of training, of each run")
    chosen = options.parse_args()
    known = json.loads(RECORD.read_text())["runs"] if RECORD.exists() else []

    def write() -> None:
        whole = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "runs": known}
        RECORD.write_text(json.dumps(whole, indent=1) + "\n")

    HOME.mkdir(parents=True, exist_ok=True)
    for name in [chosen.only] if chosen.only else list(SETS):
        measured(name, chosen.hours, known, write)
    print(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
