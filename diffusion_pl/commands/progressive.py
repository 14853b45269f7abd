"""`progressive`: the denoised image at each noise level (Ho et al. 2020, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.commands import latents, runs
from diffusion_pl.commands.options import (
    BaseAlone,
    ConditionOptions,
    Integer,
    RunOptions,
    RunPath,
    SamplerOptions,
)
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

SAME = 1e-6  # in [-1, 1]: differences below are rounding


def command(
    run: RunPath,
    /,
    *,
    count: Integer = 8,
    frames: Integer = 10,
    share: float | None = None,
    base_alone: BaseAlone = False,
    out: Path | None = None,
    conditions: ConditionOptions = ConditionOptions(),
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Sample images and show the denoised image at each noise level.

    The grid has an image a row and a level a column; with --share, images from one shared start.

    Example: diffusion_pl progressive runs/mine --count 8 --frames 10

    Args:
        count: number of images.
        frames: number of levels shown.
        share: COUNT images that share their noise down to this sigma.
        out: folder of the images; RUN/progressive when not given.
    """
    if count < 1 or frames < 1:
        raise UserError(f"--count and --frames must be positive (got {count}, {frames})")
    opened = runs.open_run(run, sampling, options, conditions)
    generator = opened.generator
    with generator.inference():
        if share is None:
            images, shown = denoised_frames(generator, range(count), frames, base_alone)
        else:
            sampler = latents.single_size_sampler(generator, "progressive", base_alone)
            images = _branches(generator, sampler, count, share)[:, None]
            shown = [(generator.shape[1], 0.0)]
    folder = out or opened.folder / "progressive"
    pixels = to_bytes(images).cpu()
    for row, levels in enumerate(pixels):
        for column, image in enumerate(levels):
            save_png(image, folder / f"{row:06d}_{column:03d}.png")
    columns = None if share is not None else len(shown)
    save_png(grid(pixels.flatten(0, 1), columns=columns), folder / "grid.png")
    result = {
        **opened.about(folder),
        "count": count,
        "sigmas": [sigma for _, sigma in shown],
        "sizes": [side for side, _ in shown],
        "shared_above": share,
    }
    return Result(result)


def denoised_frames(
    generator: ImageGenerator, indices: Sequence[int], frames: int, base_alone: bool
) -> tuple[Tensor, list[tuple[int, float]]]:
    """The denoised image at evenly spaced steps over all sizes, then the image itself.

    Args:
        generator: of the run.
        indices: of the images.
        frames: levels at most; fewer where the sampler visits fewer.
        base_alone: of a pyramid, its base at full size.

    Returns:
        (n, frames + 1, C, H, W), smaller ones by repeated pixels; side and sigma of each frame.
    """
    side = generator.shape[1]
    sampler: Sampler | PyramidSampler
    if isinstance(generator.sampler, PyramidSampler) and not base_alone:
        sampler = generator.sampler
        stages = [(height, levels) for (height, _), levels in sampler.sampled_stages(side, side)]
    else:
        sampler = latents.single_size_sampler(generator, "progressive", base_alone)
        stages = [(side, sampler.sigmas())]
    visited = [(size, sigma) for size, levels in stages for sigma in levels[:-1].tolist()]
    steps = torch.linspace(0, len(visited) - 1, min(frames, len(visited))).round().long()
    wanted = [visited[step] for step in steps.tolist()]
    denoise = generator.guided(generator.condition(indices), indices=indices)
    recorded = {
        size: Recorded(denoise, [sigma for at, sigma in wanted if at == size]) for size, _ in stages
    }

    def by_size(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        return recorded[x.shape[-1]](x, sigma, **more)

    end = sampler(by_size, generator.noise(indices), generator.step_noise(indices))
    small = [image for size, _ in stages for image in recorded[size].images]
    images = [resized(image.to(torch.float32), (side, side), "area") for image in small]
    return torch.stack([*images, end.to(torch.float32)], dim=1), [*wanted, (side, 0.0)]


def _branches(generator: ImageGenerator, sampler: Sampler, count: int, level: float) -> Tensor:
    """Images that share image 0's noise down to the level, and have their own below it."""
    own = ImageNoise(generator.seed, range(count), "branch", generator.device)
    shared = generator.condition([0])

    def denoise(x: Tensor, sigma: Tensor, **more: bool) -> Tensor:
        same = {key: value.expand(len(x), *value.shape[1:]) for key, value in shared.items()}
        return sampler.limited(generator.guided(same))(x, sigma, **more)

    ends = branch(
        denoise,
        generator.noise([0]).to(torch.float64) * sampler.start_std,
        sampler.sigmas(),
        level,
        generator.step_noise([0]),
        own,
        integrate=sampler.integrate,
        count=count,
    )
    if count > 1 and float((ends - ends[:1]).abs().max()) < SAME:
        raise UserError(
            f"--share {level:g}: the sampler adds no noise below it, so all {count} images are the "
            "same; choose a stochastic one, such as --sampler ancestral"
        )
    return ends
