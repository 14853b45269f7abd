"""What the commands between images and noise share: reading pictures, one guided denoiser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion_pl.data.decode import read_square
from diffusion_pl.diffusion.guidance import Clip, clipped, guided
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import ImageGenerator
from diffusion_pl.images import from_bytes
from diffusion_pl.io.files import regular
from diffusion_pl.samplers.named import integrator
from diffusion_pl.samplers.pyramid import PyramidSampler
from diffusion_pl.samplers.sampler import Integrator, Sampler


def read_images(paths: Sequence[Path], generator: ImageGenerator) -> Tensor:
    """Image files of a model's size, on its device.

    Args:
        paths: PNG, JPEG or WebP.
        generator: of the model.

    Returns:
        float32 (n, 3, H, W) in [-1, 1].

    Raises:
        UserError: a file that is unreadable or of another size.
    """
    channels, side, _ = generator.shape
    read = []
    for path in paths:
        try:
            data = regular(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        square = read_square(data, side, "exact", where=str(path), channels=channels)
        read.append(torch.from_numpy(square.copy()))
    return from_bytes(torch.stack(read)).to(device(generator))


def device(generator: ImageGenerator) -> torch.device:
    """Where the model lies."""
    return next(generator.denoiser.parameters()).device


def denoise_of(generator: ImageGenerator, labels: Tensor | None, *, clip: Clip = False) -> Denoise:
    """The model with its labels closed in, guided and clipped as it draws.

    Args:
        generator: of the model.
        labels: int64 (B,), None for a model without classes.
        clip: to images, as the sampler says.
    """
    guide = None if generator.guide is None else generator.guide.denoiser.to(device(generator))
    denoise = guided(
        generator.denoiser,
        label=None if labels is None else labels.to(device(generator)),
        weight=generator.guidance,
        interval=generator.guidance_interval,
        guide=guide,
    )
    return clipped(denoise, clip) if clip else denoise


def required_labels(generator: ImageGenerator, count: int) -> Tensor | None:
    """The class that the command line names, for each of some images.

    Raises:
        UserError: a model with classes, and no class named.
    """
    if generator.classes and generator.label is None:
        raise UserError(f"--label: name the images' class, 0 to {generator.classes - 1}")
    return generator.labels(range(count))


def single_size_sampler(generator: ImageGenerator, command: str, base_alone: bool) -> Sampler:
    """The run's sampler; a pyramid's base, from noise at full size, where that is asked for.

    Args:
        generator: of the model.
        command: its name, for messages.
        base_alone: the option that consents to it.

    Raises:
        UserError: a pyramid, whose images are not its base's; or no pyramid, and its base.
    """
    sampler = generator.sampler
    if isinstance(sampler, PyramidSampler) and len(sampler.levels) > 1:  # one level is its base
        if not base_alone:
            raise UserError(
                f"{command}: the run samples over {len(sampler.levels)} sizes, this is of one; "
                f"--base-alone takes its base from noise at {generator.shape[1]} pixels, as no "
                "image of the run is sampled"
            )
    elif base_alone:
        raise UserError("--base-alone: the run draws at one size; leave it out")
    return base_sampler(generator)


def base_sampler(generator: ImageGenerator) -> Sampler:
    """The run's sampler of one size: of a pyramid its base."""
    sampler = generator.sampler
    base = sampler.base if isinstance(sampler, PyramidSampler) else sampler
    assert isinstance(base, Sampler)
    return base


def ode_integrator(sampler: str | None) -> Integrator:
    """What goes from images to noise and back: Heun's method, or what `--sampler` names.

    Raises:
        UserError: an integrator that adds noise, or that looks back over several steps.
    """
    both_ways = ("heun", "midpoint", "euler", "ddim")
    name = sampler or "heun"
    if name not in both_ways:
        raise UserError(
            f"--sampler: {name} does not go along the flow both ways; {', '.join(both_ways)} do"
        )
    return integrator(name)


@contextlib.contextmanager
def drawn(generator: ImageGenerator) -> Iterator[None]:
    """The model's precision, without gradients."""
    autocast = torch.autocast(
        device(generator).type, generator.precision, enabled=generator.precision is not None
    )
    with torch.inference_mode(), autocast:
        yield
