"""`interpolate`: images between two of one's own (Ho 2020, section 4.4)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from diffusion_pl.commands import latents, runs
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.images import grid, save_png, to_bytes
from diffusion_pl.samplers.inversion import below, interpolate, invert, linear, spherical

FAILURES: tuple[type[Exception], ...] = ()

# Timestep 500 of 1,000 linear betas, where the paper's figure mixes.
PUBLISHED = 3.42


def run(options: argparse.Namespace) -> int:
    """Draw the images in a row, both ends included, and print where they lie."""
    if options.count < 2:
        raise UserError(f"--count: both ends are included, so at least 2 (got {options.count})")
    opened = runs.open_run(options, label=options.label)
    drawing = opened.drawing
    sampler = latents.at_one_size(drawing, options)
    images = latents.pictures(options.image, drawing)
    by_flow = options.by == "flow"
    integrate = latents.along_the_flow(options) if by_flow else sampler.integrate
    highest = float(sampler.sigmas()[0])
    level = options.sigma or (highest if by_flow else min(PUBLISHED, highest))
    sigmas = below(sampler.sigmas(), level)
    with latents.drawn(drawing):
        if by_flow:
            denoise = latents.denoise_of(drawing, latents.one_label(drawing, 2))
            ends = invert(denoise, images, sigmas, integrate)
        else:
            ends = images + level * ImageNoise(options.seed, [0, 1], "ends")(images)
        labels = latents.one_label(drawing, options.count)
        between = interpolate(
            latents.denoise_of(drawing, labels, clip=sampler.clip and not by_flow),
            (ends[0], ends[1]),
            torch.linspace(0, 1, options.count),
            sigmas,
            # One stream for all, so that the images differ by their weight alone.
            ImageNoise(options.seed, [0] * options.count, "sampler", latents.device(drawing)),
            integrate=integrate,
            mix=spherical if options.spherical else linear,
        )
    folder: Path = options.out or opened.folder / "interpolate"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = to_bytes(between).cpu()
    for index, image in enumerate(pixels):
        save_png(image, folder / f"{index:06d}.png")
    save_png(grid(pixels, columns=options.count), folder / "grid.png")
    result = {
        "folder": str(folder),
        "grid": str(folder / "grid.png"),
        **opened.about(),
        "images": [str(path) for path in options.image],
        "count": options.count,
        "sigma": level,
        "by": options.by,
        "integrate": described(integrate),
        "mix": "spherical" if options.spherical else "linear",
    }
    print(json.dumps(result))
    return 0
