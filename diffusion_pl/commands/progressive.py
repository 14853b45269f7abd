"""`progressive`: what the network makes of the image from level to level (Ho 2020, section 4.3)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from diffusion_pl.commands import latents, runs
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.recording import Recorded
from diffusion_pl.evaluation import Drawing
from diffusion_pl.images import grid, save_png, to_bytes
from diffusion_pl.samplers.inversion import branch
from diffusion_pl.samplers.sampler import Sampler

FAILURES: tuple[type[Exception], ...] = ()


def run(options: argparse.Namespace) -> int:
    """Draw a sheet, an image a row and a level a column, or several ends of one beginning."""
    if options.count < 1 or options.frames < 1:
        raise ValueError(
            f"--count and --frames must be positive (got {options.count}, {options.frames})"
        )
    opened = runs.open_run(options, label=options.label)
    drawing = opened.drawing
    sampler = latents.at_one_size(drawing)
    with latents.drawn(drawing):
        if options.share is None:
            frames, sigmas = _frames(drawing, sampler, options.count, options.frames)
        else:
            frames = _branches(drawing, sampler, options.count, options.share)[:, None]
            sigmas = [0.0]
    folder: Path = options.out or opened.folder / "progressive"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = to_bytes(frames).cpu()
    for row, images in enumerate(pixels):
        for column, image in enumerate(images):
            save_png(image, folder / f"{row:06d}_{column:03d}.png")
    columns = None if options.share is not None else len(sigmas)
    save_png(grid(pixels.flatten(0, 1), columns=columns), folder / "grid.png")
    result = {
        "folder": str(folder),
        "grid": str(folder / "grid.png"),
        **opened.about(),
        "count": options.count,
        "sigmas": sigmas,
        "shared_above": options.share,
    }
    print(json.dumps(result))
    return 0


def _frames(
    drawing: Drawing, sampler: Sampler, count: int, frames: int
) -> tuple[Tensor, list[float]]:
    """What is denoised at evenly spaced steps, then the image: (count, frames + 1, C, H, W)."""
    visited = sampler.sigmas()[:-1]
    steps = torch.linspace(0, len(visited) - 1, min(frames, len(visited))).round().long()
    wanted = visited[steps].tolist()
    indices = range(count)
    where = latents.device(drawing)
    noise = ImageNoise(drawing.seed, indices, "latent")(torch.empty(count, *drawing.shape))
    recorded = Recorded(latents.denoise_of(drawing, drawing.labels(indices)), wanted)
    end = sampler(recorded, noise.to(where), ImageNoise(drawing.seed, indices, "sampler", where))
    shown = torch.stack([image.to(torch.float32) for image in [*recorded.images, end]], dim=1)
    return shown, [*wanted, 0.0]


def _branches(drawing: Drawing, sampler: Sampler, count: int, level: float) -> Tensor:
    """Ends of image 0's beginning, each with noise of its own below the level."""
    where = latents.device(drawing)
    noise = ImageNoise(drawing.seed, [0], "latent")(torch.empty(1, *drawing.shape)).to(where)
    shared = ImageNoise(drawing.seed, [0], "sampler", where)
    own = ImageNoise(drawing.seed, range(count), "branch", where)
    label = drawing.labels([0])

    def denoise(x: Tensor, sigma: Tensor, **more: bool) -> Tensor:
        labels = None if label is None else label.expand(len(x))
        return latents.denoise_of(drawing, labels, clip=sampler.clip)(x, sigma, **more)

    return branch(
        denoise,
        noise.to(torch.float64) * sampler.start_std,
        sampler.sigmas(),
        level,
        shared,
        own,
        integrate=sampler.integrate,
        count=count,
    )
