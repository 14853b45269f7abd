"""`sample`: sample images from a run into a folder; see `sample_folder`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from diffusion_pl.commands import hints, runs
from diffusion_pl.commands.options import (
    ConditionOptions,
    Integer,
    RunOptions,
    RunPath,
    SamplerOptions,
)
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
    count: Integer = 64,
    first: Integer = 0,
    out: Path | None = None,
    conditions: ConditionOptions = ConditionOptions(),
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Sample images from a run: PNG files, a grid, an .npz.

    Image i depends on (seed, i) alone, and the same command with a larger count adds images.

    Example: diffusion_pl sample runs/mine --count 64 --sampler deis --steps 18

    Args:
        count: number of images.
        first: index of the first image.
        out: folder of the images; RUN/drawn when not given.
    """
    if count < 1 or first < 0:
        raise UserError(f"--count must be positive, --first at least 0 (got {count}, {first})")
    opened = runs.open_run(run, sampling, options, conditions)
    generator = opened.generator
    wanted = range(first, first + count)
    folder, whole = folder_for(out, opened, wanted)
    missing = folder.missing(whole)
    pieces = list(batches(missing, options.batch_size or BATCH))
    with sampling_bar(generator, len(missing)):
        for piece in pieces:
            images, folder.evaluations = generator.images(piece)
            folder.add(piece, images.cpu())
    folder.finish(whole)
    sheet = folder.folder / "grid.png"
    words = generator.words(whole[:GRID], opened.model.class_names)
    shown = generator.beside_sources(whole[:GRID], folder.read(whole[:GRID]))
    save_png(grid(shown, words=words), sheet)
    result = {
        **opened.about(folder.folder),
        "images": str(folder.images),
        "count": count,
        "drawn": len(missing),
        "total": len(whole),
        "evaluations": folder.evaluations,
    }
    lines = [
        line("of", f"{opened.model.checkpoint}, {opened.model.images:,} images seen"),
        line("images", f"{folder.images}  ({len(whole):,}, of which {len(missing):,} new)"),
        line("grid", sheet),
    ]
    if conditions.label is None and opened.model.class_names:
        lines.append(line("classes", hints.classes(opened.model.class_names)))
    if (data := runs.missing_data(opened.model.config)) is None:
        after = hints.next_line("evaluate", run)
    else:
        asked = hints.command("evaluate", run, "--set", "data.dataset.path=PATH")
        after = f"measure  {asked}  ({data}, its data, is not here)"
    return Result(result, lines, [after])


def folder_for(
    out: Path | None, opened: runs.OpenedRun, wanted: range
) -> tuple[SampleFolder, range]:
    """The folder for the images and the range of images that it will hold.

    When not named, it is RUN/drawn, and for images of other settings RUN/drawn-2, RUN/drawn-3, ...

    Raises:
        UserError: the named folder holds other images.
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
def sampling_bar(generator: ImageGenerator, count: int) -> Iterator[None]:
    """A progress bar that advances with every network evaluation, as a batch may take minutes.

    Args:
        generator: samples the images.
        count: number of images.
    """
    with bar("sampling", lambda: count * sum(generator.calls().values())) as advance:
        if advance is None:
            yield
            return

        def count_images(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            advance(len(inputs[0]))

        denoisers = [
            generator.denoiser,
            *([] if generator.guide is None else [generator.guide.denoiser]),
        ]
        hooks = [each.network.register_forward_hook(count_images) for each in denoisers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
