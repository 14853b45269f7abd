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
from diffusion_pl.evaluation import Drawing
from diffusion_pl.images import from_bytes
from diffusion_pl.samplers.pyramid import PyramidSampler
from diffusion_pl.samplers.sampler import Sampler


def pictures(paths: Sequence[Path], drawing: Drawing) -> Tensor:
    """Image files of a model's size, on its device.

    Args:
        paths: PNG, JPEG or WebP.
        drawing: of the model.

    Returns:
        float32 (n, 3, H, W) in [-1, 1].

    Raises:
        ValueError: a file that is unreadable or of another size.
    """
    channels, side, _ = drawing.shape
    read = []
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
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
        ValueError: a model with classes, and no class named.
    """
    if drawing.classes and drawing.label is None:
        raise ValueError(f"--label: name the images' class, 0 to {drawing.classes - 1}")
    return drawing.labels(range(count))


def at_one_size(drawing: Drawing) -> Sampler:
    """The run's sampler at the images' own size: of a pyramid that is its base."""
    sampler = drawing.sampler
    if isinstance(sampler, PyramidSampler):
        return sampler.base
    assert isinstance(sampler, Sampler)
    return sampler


@contextlib.contextmanager
def drawn(drawing: Drawing) -> Iterator[None]:
    """The model's precision, without gradients."""
    autocast = torch.autocast(
        device(drawing).type, drawing.precision, enabled=drawing.precision is not None
    )
    with torch.inference_mode(), autocast:
        yield
