"""`invert`: encode images to latents along the probability-flow ODE, and decode them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffusion_pl.commands import latents, runs
from diffusion_pl.commands.options import (
    BaseAlone,
    ConditionOptions,
    RunOptions,
    RunPath,
    SamplerOptions,
)
from diffusion_pl.commands.results import Result
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.images import grid, save_png, to_bytes
from diffusion_pl.samplers.inversion import invert


def command(
    run: RunPath,
    image: tuple[Path, ...],
    /,
    *,
    base_alone: BaseAlone = False,
    out: Path | None = None,
    conditions: ConditionOptions = ConditionOptions(),
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Encode images to noise along the probability-flow ODE, and decode them.

    Writes the latents divided by the highest sigma, a grid of the decoded images, and their error.

    Example: diffusion_pl invert runs/mine a.png b.png --label 3

    Args:
        image: PNG files of the run's size.
        out: folder of the latents; RUN/invert when not given.
    """
    opened = runs.open_run(run, sampling, options, conditions, complete=True)
    generator = opened.generator
    sampler = latents.single_size_sampler(generator, "invert", base_alone)
    integrate = latents.ode_integrator(sampling.sampler, sampler.integrate)
    images = latents.read_images(image, generator)
    sigmas = sampler.sigmas()
    with generator.inference():
        denoise = generator.guided(generator.condition(range(len(images))))
        state = invert(denoise, images, sigmas, integrate)
        again = integrate(denoise, state, sigmas, torch.zeros_like)
    error = (again - images).square().flatten(1).mean(dim=1).sqrt() * 127.5
    folder = out or opened.folder / "invert"
    folder.mkdir(parents=True, exist_ok=True)
    latent = (state / float(sigmas[0])).cpu()
    np.savez(folder / "latents.npz", latents=latent.numpy(), sigma=float(sigmas[0]))
    pixels = to_bytes(torch.stack([images, again.to(images.dtype)]).flatten(0, 1)).cpu()
    save_png(grid(pixels, columns=len(images)), folder / "grid.png")
    result = {
        **opened.about(folder),
        "images": [str(path) for path in image],
        "integrate": described(integrate),
        "steps": len(sigmas) - 1,
        "latent_std": [round(float(row.std()), 4) for row in latent],
        "rms_error_of_255": [round(value, 4) for value in error.tolist()],
    }
    return Result(result)
