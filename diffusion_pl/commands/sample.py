"""`sample`: draw images from a run: PNG files, a grid, an .npz; image i depends on (seed, i).

The same command with more images goes on; see `sample_folder`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from diffusion_pl.commands import hints, runs
from diffusion_pl.commands.options import RunOptions, RunPath, SamplerOptions
from diffusion_pl.commands.results import Result, line
from diffusion_pl.commands.sample_folder import OtherImages, SampleFolder
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import ImageGenerator, batches
from diffusion_pl.images import grid, save_png
from diffusion_pl.progress import bar

BATCH = 64
GRID = 64  # images on the grid at most


def command(
    run: RunPath,
    /,
    *,
    count: int = 64,
    first: int = 0,
    label: str | None = None,
    out: Path | None = None,
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Sample images from a run: PNG files, a grid, an .npz.

    Image i depends on (seed, i), and the same command with more images goes on.

    Example: diffusion_pl sample runs/mine --count 64 --sampler deis --steps 18

    Args:
        count: how many images.
        first: index of the first image.
        label: class of every image, its name or index; drawn when not given.
        out: folder of the images; RUN/drawn when not given.
    """
    if count < 1 or first < 0:
        raise UserError(f"--count must be positive, --first at least 0 (got {count}, {first})")
    opened = runs.open_run(run, sampling, options, label=label)
    generator = opened.generator
    wanted = range(first, first + count)
    folder, whole = folder_for(out, opened, wanted)
    missing = folder.missing(whole)
    pieces = list(batches(missing, options.batch_size or BATCH))
    with watched(generator, len(missing)):
        for piece in pieces:
            images, folder.evaluations = generator.images(piece)
            folder.add(piece, images.cpu())
    folder.finish(whole)
    sheet = folder.folder / "grid.png"
    save_png(grid(folder.read(whole[:GRID])), sheet)
    result = {
        "folder": str(folder.folder),
        "images": str(folder.images),
        "grid": str(sheet),
        **opened.about(),
        "count": count,
        "drawn": len(missing),
        "total": len(whole),
        "evaluations": folder.evaluations,
    }
    lines = [
        line("of", f"{opened.model.checkpoint}, {opened.model.images:,} images seen"),
        line("images", f"{folder.images}  ({len(whole):,}, of which {len(missing):,} drawn now)"),
        line("grid", sheet),
    ]
    if label is None and opened.model.class_names:
        lines.append(line("classes", hints.classes(opened.model.class_names)))
    if (data := runs.missing_data(opened.model.config)) is None:
        after = hints.next_line("evaluate", run)
    else:
        words = hints.command("evaluate", run, "--set", "data.dataset.path=PATH")
        after = f"measure  {words}  ({data}, its data, is not here)"
    return Result(result, lines, [after])


def folder_for(
    out: Path | None, opened: runs.OpenedRun, wanted: range
) -> tuple[SampleFolder, range]:
    """Where the images go, and which it will hold: what is named, else one of the run's own.

    Those are RUN/drawn, and for images of other settings RUN/drawn-2, RUN/drawn-3, ...

    Raises:
        UserError: the folder that is named holds other images.
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


@contextlib.contextmanager
def watched(generator: ImageGenerator, count: int) -> Iterator[None]:
    """A bar on a terminal that moves with every pass of a network: one batch may take minutes.

    Args:
        generator: how images are drawn.
        count: of images.
    """
    with bar("drawing", lambda: count * sum(generator.calls().values())) as advance:
        if advance is None:
            yield
            return

        def passed(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            advance(len(inputs[0]))

        denoisers = [
            generator.denoiser,
            *([] if generator.guide is None else [generator.guide.denoiser]),
        ]
        hooks = [each.network.register_forward_hook(passed) for each in denoisers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
