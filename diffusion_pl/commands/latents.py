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
from diffusion_pl.evaluation import Drawing
from diffusion_pl.images import from_bytes
from diffusion_pl.io.files import regular
from diffusion_pl.samplers.named import integrator
from diffusion_pl.samplers.pyramid import PyramidSampler
from diffusion_pl.samplers.sampler import Integrator, Sampler


def pictures(paths: Sequence[Path], drawing: Drawing) -> Tensor:
    """Image files of a model's size, on its device.

    Args:
        paths: PNG, JPEG or WebP.
        drawing: of the model.

    Returns:
        float32 (n, 3, H, W) in [-1, 1].

    Raises:
        UserError: a file that is unreadable or of another size.
    """
    channels, side, _ = drawing.shape
    read = []
    for path in paths:
        try:
            data = regular(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        square = read_square(data, side, "exact", where=str(path), channels=channels)
        read.append(torch.from_numpy(square.copy()))
    return from_bytes(torch.stack(read)).to(device(drawing))


def device(drawing: Drawing) -> torch.device:
    """Where the model lies."""
    return next(drawing.denoiser.parameters()).device


def denoise_of(drawing: Drawing, labels: Tensor | None, *, clip: Clip = False) -> Denoise:
    """The model with its labels closed in, guided and clipped as it draws.

    Args:
        drawing: of the model.
        labels: int64 (B,), None for a model without classes.
        clip: to images, as the sampler says.
    """
    guide = None if drawing.guide is None else drawing.guide.denoiser.to(device(drawing))
    denoise = guided(
        drawing.denoiser,
        label=None if labels is None else labels.to(device(drawing)),
        weight=drawing.guidance,
        interval=drawing.guidance_interval,
        guide=guide,
    )
    return clipped(denoise, clip) if clip else denoise


def one_label(drawing: Drawing, count: int) -> Tensor | None:
    """The class that the command line names, for each of some images.

    Raises:
        UserError: a model with classes, and no class named.
    """
    if drawing.classes and drawing.label is None:
        raise UserError(f"--label: name the images' class, 0 to {drawing.classes - 1}")
    return drawing.labels(range(count))


def at_one_size(drawing: Drawing, command: str, base_alone: bool) -> Sampler:
    """The run's sampler; a pyramid's base, from noise at full size, where that is asked for.

    Args:
        drawing: of the model.
        command: its name, for messages.
        base_alone: the option that consents to it.

    Raises:
        UserError: a pyramid, whose images are not its base's; or no pyramid, and its base.
    """
    sampler = drawing.sampler
    if isinstance(sampler, PyramidSampler) and len(sampler.levels) > 1:  # one level is its base
        if not base_alone:
            raise UserError(
                f"{command}: the run draws over {len(sampler.levels)} sizes, and this is "
                f"of one; --base-alone takes its base from noise at {drawing.shape[1]} pixels, as "
                "no image of the run is drawn"
            )
    elif base_alone:
        raise UserError("--base-alone: the run draws at one size; leave it out")
    return base_of(drawing)


def base_of(drawing: Drawing) -> Sampler:
    """The run's sampler of one size: of a pyramid its base."""
    sampler = drawing.sampler
    base = sampler.base if isinstance(sampler, PyramidSampler) else sampler
    assert isinstance(base, Sampler)
    return base


def along_the_flow(sampler: str | None) -> Integrator:
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
def drawn(drawing: Drawing) -> Iterator[None]:
    """The model's precision, without gradients."""
    autocast = torch.autocast(
        device(drawing).type, drawing.precision, enabled=drawing.precision is not None
    )
    with torch.inference_mode(), autocast:
        yield
