"""`sample`: draw images from a run: PNG files, a grid, an .npz; image i depends on (seed, i)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from diffusion_pl.commands import runs
from diffusion_pl.evaluation import batches
from diffusion_pl.images import grid, save_png

FAILURES: tuple[type[Exception], ...] = ()

BATCH = 64
GRID = 64  # images on the grid at most


def run(options: argparse.Namespace) -> int:
    """Draw the images and print what was drawn as one JSON object."""
    if options.count < 1 or options.first < 0:
        raise ValueError(f"--count must be positive (got {options.count}), --first at least 0")
    opened = runs.open_run(options, label=options.label)
    drawing = opened.drawing
    folder: Path = options.out or opened.folder / "drawn"
    folder.mkdir(parents=True, exist_ok=True)
    indices = range(options.first, options.first + options.count)
    pieces = list(batches(indices, options.batch_size or BATCH))
    drawn, evaluations = [], 0
    for piece in track(pieces, "drawing", console=Console(stderr=True), transient=True):
        images, evaluations = drawing.images(piece)
        drawn.append(images.cpu())
        for index, image in zip(piece, drawn[-1], strict=True):
            save_png(image, folder / f"{index:06d}.png")
    everything = torch.cat(drawn)
    save_png(grid(everything[:GRID]), folder / "grid.png")
    labels = drawing.labels(indices)
    np.savez(
        folder / "images.npz",
        images=everything.permute(0, 2, 3, 1).numpy(),
        labels=np.full(len(indices), -1) if labels is None else labels.numpy(),
    )
    print(
        json.dumps(
            {
                "folder": str(folder),
                "grid": str(folder / "grid.png"),
                **opened.about(),
                "count": options.count,
                "evaluations": evaluations,
            }
        )
    )
    return 0
