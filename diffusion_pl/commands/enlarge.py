"""`enlarge`: super-resolution, a pyramid from an image that stays consistent with it."""

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
from diffusion_pl.commands.options import (
    ConditionOptions,
    Integer,
    RunOptions,
    RunPath,
    SamplerOptions,
)
from diffusion_pl.commands.results import Result
from diffusion_pl.data.decode import decode
from diffusion_pl.data.files import EXTENSIONS, ending_of, is_leftover
from diffusion_pl.diffusion.consistency import consistent as consistent_with
from diffusion_pl.diffusion.consistency import factor, nearest
from diffusion_pl.diffusion.recording import Counted
from diffusion_pl.diffusion.resizing import resized
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import ImageGenerator, batches
from diffusion_pl.images import from_bytes, grid, save_png, to_bytes
from diffusion_pl.io.files import read_named
from diffusion_pl.progress import track
from diffusion_pl.samplers.pyramid import PyramidSampler

BATCH = 16
ROWS = 16  # of the grid at most
# Variation v of image i has index 1,000 i + v, so it does not depend on how many there are.
VARIATIONS = 1_000


@dataclass(frozen=True)
class Task:
    """One image to enlarge.

    Args:
        path: its file.
        image: uint8 (3, h, w).
        size: height and width of the result.
        pyramid: from the image's size to the result's.
    """

    path: Path
    image: Tensor
    size: tuple[int, int]
    pyramid: PyramidSampler


def command(
    run: RunPath,
    image: tuple[Path, ...],
    /,
    *,
    to: Integer | None = None,
    restart: float | None = None,
    consistent: Annotated[bool, Parameter(negative="--no-consistent")] = True,
    count: Integer = 1,
    out: Path | None = None,
    conditions: ConditionOptions = ConditionOptions(),
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Super-resolution: sample larger versions of given images.

    Writes the images and a grid, and prints their largest difference from the given ones.

    Example: diffusion_pl enlarge runs/mine small.png --to 64 --count 4

    Args:
        image: PNG, JPEG or WebP files, or folders.
        to: longer side, pixels; the run's when not given.
        restart: sigma to restart from at each size; half the factor when not given.
        consistent: make the result, downsampled, equal the image.
        count: variations of each image.
        out: folder of the results; RUN/enlarge when not given.
    """
    if not 1 <= count <= VARIATIONS:
        raise UserError(f"--count must be 1 to {VARIATIONS:,} (got {count})")
    paths = files(image)
    opened = runs.open_run(run, sampling, options, conditions, complete=True)
    generator = opened.generator
    side = generator.shape[1] if to is None else to
    tasks = [
        make_task(read_rgb(path), path, generator, side, restart, consistent) for path in paths
    ]
    folder = out or opened.folder / "enlarge"
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
        rows.append({**describe(each, images), "evaluations": found[0][1], "files": names})
        shown.append(grid_row(each, images))
    result = opened.about(folder)
    if len({row.shape for row in shown}) == 1:
        sheet = grid(torch.cat(shown[:ROWS]), columns=count + 1, zoom=1)
        save_png(sheet, folder / "grid.png")
    else:
        result["grid"] = None
    result |= {
        "count": count,
        "consistent": consistent,
        "pictures": rows,
    }
    return Result(result)


def files(paths: Sequence[Path]) -> list[Path]:
    """The given files, and the images in the given folders in the order of their names.

    Raises:
        UserError: a folder has no images.
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
                raise UserError(f"{path}: has no images ({', '.join(sorted(EXTENSIONS))})")
        found += inside
    return found


def read_rgb(path: Path) -> Tensor:
    """An image file, uint8 (3, h, w).

    Raises:
        UserError: it cannot be read.
    """
    image = np.array(decode(read_named(path), where=str(path)))
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


def make_task(
    image: Tensor,
    path: Path,
    generator: ImageGenerator,
    to: int,
    restart: float | None,
    consistent: bool,
) -> Task:
    """Choose the sizes over which an image is enlarged.

    Args:
        image: uint8 (3, h, w).
        path: its file, for messages.
        generator: of the model.
        to: longer side of the result.
        restart: sigma of every size; None for the run's own, or half the factor.
        consistent: whether the result is to be consistent with the image.

    Raises:
        UserError: the image is as large as the result, or for a consistent one does not divide it;
            or the network does not take a size.
    """
    if generator.shape[0] != 3:
        raise UserError(f"image files are read as RGB, the model has {generator.shape[0]} channels")
    height, width = image.shape[1:]
    side = max(height, width)
    if side >= to:
        raise UserError(
            f"{path}: {width} x {height} pixels are not smaller than --to {to}; it only enlarges"
        )
    size = round(height * to / side), round(width * to / side)
    pyramid = pyramid_to(
        generator, side, to, restart, lambda level: not consistent or level % side == 0
    )
    network: Any = generator.denoiser.network
    try:
        if consistent:
            factor((height, width), size)
        for level in pyramid.sizes(*size)[1:]:
            network.check_resolution(*level)
        pyramid.stages()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return Task(path, image, size, pyramid)


def pyramid_to(
    generator: ImageGenerator,
    side: int,
    to: int,
    restart: float | None,
    fits: Callable[[int], bool],
) -> PyramidSampler:
    """The pyramid from an image's side to the result's, over the run's own sizes in between.

    Args:
        generator: of the model.
        side: longer side of the image, pixels.
        to: longer side of the result, pixels.
        restart: sigma of every size. None: the run's own at its sizes, and half the factor at
            others, so that the image's own pixels have noise of std 0.5.
        fits: which sides may lie in between.
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
    levels = [side, *between, to]
    restarts = [
        own.get(level, level / smaller / 2) if restart is None else restart
        for smaller, level in pairwise(levels)
    ]
    return PyramidSampler(
        latents.base_sampler(generator), levels, restarts, by="sigma", enlarge=kernel
    )


def enlarged(
    generator: ImageGenerator, task: Task, indices: Sequence[int], consistent: bool
) -> tuple[Tensor, int]:
    """Sample variations of an image; each depends on the image, the seed and its index alone.

    Returns:
        uint8 (n, 3, H, W) on the CPU, and network evaluations of each at all sizes together.
    """
    small = from_bytes(task.image).to(generator.device).expand(len(indices), -1, -1, -1)
    condition = generator.condition([index // VARIATIONS for index in indices])
    counted = Counted(generator.guided(condition, indices=indices))
    denoise = consistent_with(counted, small) if consistent else counted
    with generator.inference():
        image = task.pyramid.from_image(
            small, denoise, generator.noise(indices, task.size), generator.step_noise(indices)
        )
        # An integrator need not end in a denoised image.
        image = nearest(image, small) if consistent else image
    if not torch.isfinite(image).all():
        raise UserError(f"{task.path}: the image is not finite; the weights are unfit")
    return to_bytes(image).cpu(), counted.seen // len(indices)


def describe(task: Task, images: Tensor) -> dict[str, Any]:
    """What the result says of one image."""
    small = tuple(task.image.shape[1:])
    again = resized(images.to(torch.float64), (small[0], small[1]))
    return {
        "picture": str(task.path),
        "size": list(small),
        "to": list(task.size),
        "levels": [int(level) for level in task.pyramid.levels],
        "restart": [round(float(stage[0]), 6) for stage in task.pyramid.stages()[1:]],
        # Between the image and the area mean of the saved one, in levels of 255.
        "largest_difference": round(float((again - task.image).abs().max()), 4),
    }


def grid_row(task: Task, images: Tensor) -> Tensor:
    """The image with its pixels repeated, then its variations: uint8 (n + 1, 3, H, W)."""
    repeated = resized(task.image[None].to(torch.float64), task.size)
    return torch.cat([repeated.round().to(torch.uint8), images])
