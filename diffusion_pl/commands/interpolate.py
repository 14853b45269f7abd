"""`interpolate`: images between two given ones (Ho et al. 2020, section 4.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

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
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.images import grid, save_png, to_bytes
from diffusion_pl.samplers.inversion import below, interpolate, invert, linear
from diffusion_pl.samplers.inversion import spherical as great_circle

# Sigma at timestep 500 of 1,000 with linear betas, as in the paper's figure.
PUBLISHED = 3.42


def command(
    run: RunPath,
    image: tuple[Path, Path],
    /,
    *,
    count: Integer = 9,
    sigma: float | None = None,
    by: Literal["noise", "flow"] = "noise",
    spherical: bool = False,
    base_alone: BaseAlone = False,
    out: Path | None = None,
    conditions: ConditionOptions = ConditionOptions(),
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Interpolate between two images, both ends included.

    Example: diffusion_pl interpolate runs/mine a.png b.png --by flow

    Args:
        image: two PNG files of the run's size.
        count: images, both ends included.
        sigma: noise level at which they are mixed; when not given 3.42 with noise (timestep 500 of
            DDPM), the highest with flow.
        by: how images are brought to that level: added noise, or the probability-flow ODE.
        spherical: spherical interpolation in place of linear.
        out: folder of the images; RUN/interpolate when not given.
    """
    if count < 2:
        raise UserError(f"--count: both ends are included, so at least 2 (got {count})")
    opened = runs.open_run(run, sampling, options, conditions, complete=True)
    generator = opened.generator
    sampler = latents.single_size_sampler(generator, "interpolate", base_alone)
    images = latents.read_images(image, generator)
    by_flow = by == "flow"
    integrate = sampler.integrate
    if by_flow:
        integrate = latents.ode_integrator(sampling.sampler, integrate)
    highest = float(sampler.sigmas()[0])
    level = sigma or (highest if by_flow else min(PUBLISHED, highest))
    sigmas = below(sampler.sigmas(), level)
    with generator.inference():
        if by_flow:
            denoise = generator.guided(generator.condition(range(2)))
            ends = invert(denoise, images, sigmas, integrate)
        else:
            ends = images + level * ImageNoise(options.seed, [0, 1], "ends")(images)
        denoise = generator.guided(generator.condition(range(count)))
        between = interpolate(
            denoise if by_flow else sampler.limited(denoise),
            (ends[0], ends[1]),
            torch.linspace(0, 1, count),
            sigmas,
            # The same noise for all, so that the images differ by their weight alone.
            generator.step_noise([0] * count),
            integrate=integrate,
            mix=great_circle if spherical else linear,
        )
    folder = out or opened.folder / "interpolate"
    pixels = to_bytes(between).cpu()
    for index, each in enumerate(pixels):
        save_png(each, folder / f"{index:06d}.png")
    save_png(grid(pixels, columns=count), folder / "grid.png")
    result = {
        **opened.about(folder),
        "images": [str(path) for path in image],
        "count": count,
        "sigma": level,
        "by": by,
        "integrate": described(integrate),
        "mix": "spherical" if spherical else "linear",
    }
    return Result(result)
