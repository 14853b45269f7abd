"""`interpolate`: images between two of one's own (Ho 2020, section 4.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from diffusion_pl.commands import latents, runs
from diffusion_pl.commands.options import BaseAlone, RunOptions, RunPath, SamplerOptions
from diffusion_pl.commands.results import Result
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.images import grid, save_png, to_bytes
from diffusion_pl.samplers.inversion import below, interpolate, invert, linear
from diffusion_pl.samplers.inversion import spherical as great_circle

# Timestep 500 of 1,000 linear betas, where the paper's figure mixes.
PUBLISHED = 3.42


def command(
    run: RunPath,
    image: tuple[Path, Path],
    /,
    *,
    label: str | None = None,
    count: int = 9,
    sigma: float | None = None,
    by: Literal["noise", "flow"] = "noise",
    spherical: bool = False,
    base_alone: BaseAlone = False,
    out: Path | None = None,
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Draw images between two of one's own, in a row, both ends included.

    Example: diffusion_pl interpolate runs/mine a.png b.png --by flow

    Args:
        image: two PNG files of the run's size.
        label: class of every image, its name or index.
        count: images, both ends included.
        sigma: level at which they are mixed; by noise 3.42, timestep 500 of DDPM, by the flow the
            highest, when not given.
        by: how images get there.
        spherical: along the great circle.
        out: folder of the images; RUN/interpolate when not given.
    """
    if count < 2:
        raise UserError(f"--count: both ends are included, so at least 2 (got {count})")
    opened = runs.open_run(run, sampling, options, label=label)
    generator = opened.generator
    sampler = latents.single_size_sampler(generator, "interpolate", base_alone)
    images = latents.read_images(image, generator)
    by_flow = by == "flow"
    integrate = latents.ode_integrator(sampling.sampler) if by_flow else sampler.integrate
    highest = float(sampler.sigmas()[0])
    level = sigma or (highest if by_flow else min(PUBLISHED, highest))
    sigmas = below(sampler.sigmas(), level)
    with latents.drawn(generator):
        if by_flow:
            denoise = latents.denoise_of(generator, latents.required_labels(generator, 2))
            ends = invert(denoise, images, sigmas, integrate)
        else:
            ends = images + level * ImageNoise(options.seed, [0, 1], "ends")(images)
        labels = latents.required_labels(generator, count)
        between = interpolate(
            latents.denoise_of(generator, labels, clip=sampler.clip and not by_flow),
            (ends[0], ends[1]),
            torch.linspace(0, 1, count),
            sigmas,
            # One stream for all, so that the images differ by their weight alone.
            ImageNoise(options.seed, [0] * count, "sampler", latents.device(generator)),
            integrate=integrate,
            mix=great_circle if spherical else linear,
        )
    folder = out or opened.folder / "interpolate"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = to_bytes(between).cpu()
    for index, each in enumerate(pixels):
        save_png(each, folder / f"{index:06d}.png")
    save_png(grid(pixels, columns=count), folder / "grid.png")
    result = {
        "folder": str(folder),
        "grid": str(folder / "grid.png"),
        **opened.about(),
        "images": [str(path) for path in image],
        "count": count,
        "sigma": level,
        "by": by,
        "integrate": described(integrate),
        "mix": "spherical" if spherical else "linear",
    }
    return Result(result)
