"""`enlarge`: super-resolution, the pyramid begun from a picture; it stays consistent with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter
from torch import Tensor

from diffusion_pl.commands import latents, runs
from diffusion_pl.commands.options import RunOptions, RunPath, SamplerOptions
from diffusion_pl.commands.results import Result
from diffusion_pl.data.decode import decode
from diffusion_pl.data.files import EXTENSIONS, ending_of, is_leftover
from diffusion_pl.diffusion.consistency import consistent as consistent_with
from diffusion_pl.diffusion.consistency import factor, nearest
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.recording import Counted
from diffusion_pl.diffusion.resizing import resized
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import ImageGenerator, batches
from diffusion_pl.images import from_bytes, grid, save_png, to_bytes
from diffusion_pl.io.files import regular
from diffusion_pl.progress import track
from diffusion_pl.samplers.pyramid import PyramidSampler

BATCH = 16
ROWS = 16  # pictures on the grid at most
# Variation v of picture p is drawn from index 1,000 p + v, so that neither depends on how many.
VARIATIONS = 1_000


@dataclass(frozen=True)
class Task:
    """One picture to enlarge.

    Args:
        path: its file.
        picture: uint8 (3, h, w).
        size: height and width of the result.
        pyramid: from the picture's size to that.
    """

    path: Path
    picture: Tensor
    size: tuple[int, int]
    pyramid: PyramidSampler


def command(
    run: RunPath,
    image: tuple[Path, ...],
    /,
    *,
    to: int | None = None,
    restart: float | None = None,
    consistent: Annotated[bool, Parameter(negative="--no-consistent")] = True,
    count: int = 1,
    label: str | None = None,
    out: Path | None = None,
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Super-resolution: sample larger images of one's own.

    Written are the images and a grid, and how far they are from the given ones.

    Example: diffusion_pl enlarge runs/mine small.png --to 64 --count 4

    Args:
        image: PNG, JPEG or WebP files, or folders.
        to: longer side, pixels; the run's when not given.
        restart: sigma to begin from; half the factor when not given.
        consistent: made smaller again, the result is the image.
        count: variations of each image.
        label: class of every image, its name or index.
        out: folder of the results; RUN/enlarge when not given.
    """
    if not 1 <= count <= VARIATIONS:
        raise UserError(f"--count must be 1 to {VARIATIONS:,} (got {count})")
    paths = files(image)
    opened = runs.open_run(run, sampling, options, label=label)
    generator = opened.generator
    side = generator.shape[1] if to is None else to
    tasks = [task(path, generator, side, restart, consistent) for path in paths]
    folder = out or opened.folder / "enlarge"
    folder.mkdir(parents=True, exist_ok=True)
    shown, rows = [], []
    progress = track(tasks, "enlarging")
    for number, each in enumerate(progress):
        indices = [number * VARIATIONS + variation for variation in range(count)]
        pieces = batches(indices, options.batch_size or BATCH)
        found = [enlarged(generator, each, piece, consistent) for piece in pieces]
        images = torch.cat([larger for larger, _ in found])
        names = [f"{number:06d}_{variation:03d}.png" for variation in range(count)]
        for name, larger in zip(names, images, strict=True):
            save_png(larger, folder / name)
        rows.append({**about(each, images), "evaluations": found[0][1], "files": names})
        shown.append(sheet_row(each, images))
    sheet = None
    if len({row.shape for row in shown}) == 1:
        sheet = folder / "grid.png"
        columns = count + 1
        save_png(grid(torch.cat(shown[:ROWS]), columns=columns, zoom=1), sheet)
    result = {
        "folder": str(folder),
        "grid": None if sheet is None else str(sheet),
        **opened.about(),
        "count": count,
        "consistent": consistent,
        "pictures": rows,
    }
    return Result(result)


def files(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and the pictures of the folders that are, by name.

    Raises:
        UserError: a folder without pictures.
    """
    found: list[Path] = []
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(
                file
                for file in path.iterdir()
                if ending_of(file.name) in EXTENSIONS and not is_leftover(file.name)
            )
            if not inside:
                raise UserError(f"{path}: holds no picture ({', '.join(sorted(EXTENSIONS))})")
        found += inside
    return found


def task(
    path: Path, generator: ImageGenerator, to: int, restart: float | None, agree: bool
) -> Task:
    """Read a picture and say over which sizes it is enlarged.

    Args:
        path: PNG, JPEG or WebP.
        generator: of the model.
        to: longer side of the result.
        restart: sigma of every size; None for the run's own, or half the factor.
        agree: whether the result is to be consistent with the picture.

    Raises:
        UserError: a file that cannot be read, one as large as the result, one that is no whole
            part of it, or a size that the network does not take.
    """
    if generator.shape[0] != 3:
        raise UserError(f"image files are read as RGB, the model has {generator.shape[0]} channels")
    try:
        data = regular(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    image = np.array(decode(data, where=str(path)))
    picture = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()
    return task_of(picture, path, generator, to, restart, agree)


def task_of(
    picture: Tensor,
    path: Path,
    generator: ImageGenerator,
    to: int,
    restart: float | None,
    agree: bool,
) -> Task:
    """Say over which sizes a picture is enlarged: uint8 (C, h, w), and its name for messages.

    Raises:
        UserError: as `task`.
    """
    height, width = picture.shape[1:]
    side = max(height, width)
    if side >= to:
        raise UserError(
            f"{path}: {width} x {height} pixels are not smaller than --to {to}; it only enlarges"
        )
    size = round(height * to / side), round(width * to / side)
    pyramid = climb(generator, side, to, restart, lambda level: not agree or level % side == 0)
    network: Any = generator.denoiser.network
    try:
        if agree:
            factor((height, width), size)
        for level in pyramid.sizes(*size)[1:]:
            network.check_resolution(*level)
        pyramid.stages()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return Task(path, picture, size, pyramid)


def climb(
    generator: ImageGenerator,
    side: int,
    to: int,
    restart: float | None,
    fits: Callable[[int], bool],
) -> PyramidSampler:
    """The pyramid from a picture's side to the result's, over the sizes of the run's own between.

    Args:
        generator: of the model.
        side: longer side of the picture.
        to: longer side of the result.
        restart: sigma of every size. Otherwise the run's own for its sizes, and half the factor for
            others: a picture's own pixels then see noise of a half.
        fits: which sides may lie between.
    """
    own: dict[int, float] = {}
    kernel = PyramidSampler.enlarge
    sampler = generator.sampler
    if isinstance(sampler, PyramidSampler):
        kernel = sampler.enlarge
        sides = [max(size) for size in sampler.sizes(*generator.shape[1:])]
        starts = [float(stage[0]) for stage in sampler.stages()]
        own = dict(zip(sides[1:], starts[1:], strict=True))
        between = [level for level in sides if side < level < to and fits(level)]
    else:
        between = []
    base = latents.base_sampler(generator)
    levels = [side, *between, to]
    restarts = [
        own.get(level, level / smaller / 2) if restart is None else restart
        for smaller, level in pairwise(levels)
    ]
    return PyramidSampler(base, levels, restarts, by="sigma", enlarge=kernel)


def enlarged(
    generator: ImageGenerator, task: Task, indices: Sequence[int], agree: bool
) -> tuple[Tensor, int]:
    """Draw variations of a picture; one depends on the picture, the seed and its index alone.

    Returns:
        uint8 (n, 3, H, W) on the CPU, and the network's evaluations of each, of any size.
    """
    where = latents.device(generator)
    picture = from_bytes(task.picture).to(where).expand(len(indices), -1, -1, -1)
    noise = ImageNoise(generator.seed, indices, "latent")(torch.empty(len(indices), 3, *task.size))
    counted = Counted(
        latents.denoise_of(generator, latents.required_labels(generator, len(indices)))
    )
    denoise = consistent_with(counted, picture) if agree else counted
    with latents.drawn(generator):
        image = task.pyramid.from_picture(
            picture, denoise, noise.to(where), ImageNoise(generator.seed, indices, "sampler", where)
        )
        # An integrator need not end in what is denoised.
        image = nearest(image, picture) if agree else image
    if not torch.isfinite(image).all():
        raise UserError(f"{task.path}: the image is not finite; the weights are unfit")
    return to_bytes(image).cpu(), counted.seen // len(indices)


def about(task: Task, images: Tensor) -> dict[str, Any]:
    """What the result says of one picture."""
    small = tuple(task.picture.shape[1:])
    again = resized(images.to(torch.float64), (small[0], small[1]))
    return {
        "picture": str(task.path),
        "size": list(small),
        "to": list(task.size),
        "levels": [int(level) for level in task.pyramid.levels],
        "restart": [round(float(stage[0]), 6) for stage in task.pyramid.stages()[1:]],
        # Between the picture and the area mean of what was saved, in levels of 255.
        "largest_difference": round(float((again - task.picture).abs().max()), 4),
    }


def sheet_row(task: Task, images: Tensor) -> Tensor:
    """The picture with its pixels repeated, then its variations: uint8 (n + 1, 3, H, W)."""
    repeated = resized(task.picture[None].to(torch.float64), task.size)
    return torch.cat([repeated.round().to(torch.uint8), images])
