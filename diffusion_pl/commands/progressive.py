"""`progressive`: what the network makes of the image from level to level (Ho 2020, section 4.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.commands import latents, runs
from diffusion_pl.commands.options import BaseAlone, RunOptions, RunPath, SamplerOptions
from diffusion_pl.commands.results import Result
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.recording import Recorded
from diffusion_pl.diffusion.resizing import resized
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import ImageGenerator
from diffusion_pl.images import grid, save_png, to_bytes
from diffusion_pl.samplers.inversion import branch
from diffusion_pl.samplers.pyramid import PyramidSampler
from diffusion_pl.samplers.sampler import Sampler

SAME = 1e-6  # far below a grey level: rounding alone


def command(
    run: RunPath,
    /,
    *,
    label: str | None = None,
    count: int = 8,
    frames: int = 10,
    share: float | None = None,
    base_alone: BaseAlone = False,
    out: Path | None = None,
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Draw what the network makes of the image from level to level.

    A sheet, an image a row and a level a column; with --share, several ends of one beginning.

    Example: diffusion_pl progressive runs/mine --count 8 --frames 10

    Args:
        label: class of every image, its name or index; drawn when not given.
        count: how many images.
        frames: levels that are shown.
        share: one image down to this sigma, then COUNT.
        out: folder of the images; RUN/progressive when not given.
    """
    if count < 1 or frames < 1:
        raise UserError(f"--count and --frames must be positive (got {count}, {frames})")
    opened = runs.open_run(run, sampling, options, label=label)
    generator = opened.generator
    with latents.drawn(generator):
        if share is None:
            images, shown = _frames(generator, count, frames, base_alone)
        else:
            sampler = latents.single_size_sampler(generator, "progressive", base_alone)
            images = _branches(generator, sampler, count, share)[:, None]
            shown = [(generator.shape[1], 0.0)]
    folder = out or opened.folder / "progressive"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = to_bytes(images).cpu()
    for row, levels in enumerate(pixels):
        for column, image in enumerate(levels):
            save_png(image, folder / f"{row:06d}_{column:03d}.png")
    columns = None if share is not None else len(shown)
    save_png(grid(pixels.flatten(0, 1), columns=columns), folder / "grid.png")
    result = {
        "folder": str(folder),
        "grid": str(folder / "grid.png"),
        **opened.about(),
        "count": count,
        "sigmas": [sigma for _, sigma in shown],
        "sizes": [side for side, _ in shown],
        "shared_above": share,
    }
    return Result(result)


def _frames(
    generator: ImageGenerator, count: int, frames: int, base_alone: bool
) -> tuple[Tensor, list[tuple[int, float]]]:
    """What is denoised at evenly spaced steps over all sizes, then the image.

    Returns:
        (count, frames + 1, C, H, W), smaller ones by repeated pixels, and side and sigma of each.
    """
    side = generator.shape[1]
    sampler: Sampler | PyramidSampler
    if isinstance(generator.sampler, PyramidSampler) and not base_alone:
        sampler = generator.sampler
        stages = [(height, levels) for (height, _), levels in sampler.drawn(side, side)]
    else:
        sampler = latents.single_size_sampler(generator, "progressive", base_alone)
        stages = [(side, sampler.sigmas())]
    visited = [(size, sigma) for size, levels in stages for sigma in levels[:-1].tolist()]
    steps = torch.linspace(0, len(visited) - 1, min(frames, len(visited))).round().long()
    wanted = [visited[step] for step in steps.tolist()]
    indices = range(count)
    where = latents.device(generator)
    noise = ImageNoise(generator.seed, indices, "latent")(torch.empty(count, *generator.shape))
    denoise = latents.denoise_of(generator, generator.labels(indices))
    recorded = {
        size: Recorded(denoise, [sigma for at, sigma in wanted if at == size]) for size, _ in stages
    }

    def by_size(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        return recorded[x.shape[-1]](x, sigma, **more)

    end = sampler(by_size, noise.to(where), ImageNoise(generator.seed, indices, "sampler", where))
    small = [image for size, _ in stages for image in recorded[size].images]
    images = [resized(image.to(torch.float32), (side, side), "area") for image in small]
    return torch.stack([*images, end.to(torch.float32)], dim=1), [*wanted, (side, 0.0)]


def _branches(generator: ImageGenerator, sampler: Sampler, count: int, level: float) -> Tensor:
    """Ends of image 0's beginning, each with noise of its own below the level."""
    where = latents.device(generator)
    noise = ImageNoise(generator.seed, [0], "latent")(torch.empty(1, *generator.shape)).to(where)
    shared = ImageNoise(generator.seed, [0], "sampler", where)
    own = ImageNoise(generator.seed, range(count), "branch", where)
    label = generator.labels([0])

    def denoise(x: Tensor, sigma: Tensor, **more: bool) -> Tensor:
        labels = None if label is None else label.expand(len(x))
        return latents.denoise_of(generator, labels, clip=sampler.clip)(x, sigma, **more)

    ends = branch(
        denoise,
        noise.to(torch.float64) * sampler.start_std,
        sampler.sigmas(),
        level,
        shared,
        own,
        integrate=sampler.integrate,
        count=count,
    )
    if count > 1 and float((ends - ends[:1]).abs().max()) < SAME:
        raise UserError(
            f"--share {level:g}: the sampler adds no noise below it, so that all {count} ends are "
            "one image; take one that does, such as --sampler ancestral"
        )
    return ends
