"""`sample`: draw images from a run: PNG files, a grid, an .npz; image i depends on (seed, i).

The same command with more images goes on; see `sample_folder`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from rich.console import Console
from rich.progress import track

from diffusion_pl.commands import following, runs
from diffusion_pl.commands.sample_folder import OtherImages, SampleFolder
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
    wanted = range(options.first, options.first + options.count)
    folder, whole = folder_for(options.out, opened, wanted)
    missing = folder.missing(whole)
    pieces = list(batches(missing, options.batch_size or BATCH))
    for piece in track(pieces, "drawing", console=Console(stderr=True), transient=True):
        images, folder.evaluations = drawing.images(piece)
        folder.add(piece, images.cpu())
    folder.finish(whole)
    sheet = folder.folder / "grid.png"
    save_png(grid(folder.read(whole[:GRID])), sheet)
    print(
        json.dumps(
            {
                "folder": str(folder.folder),
                "images": str(folder.images),
                "grid": str(sheet),
                **opened.about(),
                "count": options.count,
                "drawn": len(missing),
                "total": len(whole),
                "evaluations": folder.evaluations,
            }
        ),
        flush=True,
    )
    following.tell("evaluate", options.run)
    return 0


def folder_for(out: Path | None, opened: runs.Opened, wanted: range) -> tuple[SampleFolder, range]:
    """Where the images go, and which it will hold: what is named, else one of the run's own.

    Those are RUN/drawn, and for images of other settings RUN/drawn-2, RUN/drawn-3, ...

    Raises:
        ValueError: the folder that is named holds other images.
    """
    if out is not None:
        folder = SampleFolder(out, opened)
        return folder, folder.begin(wanted)
    for number in itertools.count(1):
        name = "drawn" if number == 1 else f"drawn-{number}"
        folder = SampleFolder(opened.folder / name, opened)
        try:
            return folder, folder.begin(wanted)
        except OtherImages:
            continue
    raise AssertionError
