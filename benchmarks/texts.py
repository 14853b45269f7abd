"""Reading prepared shards with the token states of captions beside reading them without.

Captions are those of the synthetic scenes, about as many different ones as a small set has, encoded
by MiniLM into 32 tokens of 384 numbers. Everything else is as in benchmarks/data.py.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import BATCH, SMALL, WORKERS, ours, rates, write_photos
from benchmarks.measure import record
from diffusion_pl import cli
from diffusion_pl.data.shards import Shards

SIDE = 32
WORDS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
SHAPES = ("disc", "ring", "crescent", "heart", "triangle", "square", "cross", "star")
PLACES = ("left", "right", "top", "bottom", "middle", "corner", "edge", "centre")


def caption(number: int) -> str:
    """One of 4,096 captions of eleven to thirteen words."""
    colour, shape, ground, place = (number // 8**power % 8 for power in range(4))
    return (
        f"a picture of a {WORDS[colour]} {SHAPES[shape]} on a {WORDS[ground]} ground at the "
        f"{PLACES[place]}"
    )


def prepared(work: Path, encoding: str) -> Path:
    """Shards of images with a caption each, encoded."""
    source, path = work / "source", work / encoding
    if not source.is_dir():
        write_photos(source, SMALL, SIDE, "png")
        for number, image in enumerate(sorted(source.rglob("*.png"))):
            image.with_suffix(".txt").write_text(caption(number))
    words = ["prepare", source, path, "--labels", "--resolutions", SIDE, "--encoding", encoding]
    words += ["--shard-images", 500, "--encode", "minilm"]
    assert cli.main(list(map(str, words))) == 0
    return path


def measured(path: Path) -> dict[str, Any]:
    """Images a second with texts and without, in turns."""
    cases = {
        name: partial(lambda text: ours(Shards(str(path), SIDE, text=text).open()), text)
        for name, text in (("without texts", None), ("with texts", "minilm"))
    }
    found = rates(cases)
    cost = found["without texts"] / found["with texts"]
    return {"images a second": found, "cost of texts, times": round(cost, 2)}


def main() -> None:
    """Measure in turns and record."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        began = time.perf_counter()
        png = prepared(work, "png")
        figures = {
            "workers": WORKERS,
            "batch": BATCH,
            "images": SMALL,
            "prepare and encode, s": round(time.perf_counter() - began, 1),
            "PNG": measured(png),
            "raw": measured(prepared(work, "raw")),
            "load average": round(os.getloadavg()[1], 1),
        }
    record("texts", figures)


if __name__ == "__main__":
    main()
