"""What the commands on a user's images share: reading the files, samplers that can be inverted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffusion_pl.data.decode import read_square
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import ImageGenerator
from diffusion_pl.images import from_bytes
from diffusion_pl.io.files import read_named
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.named import integrator
from diffusion_pl.samplers.pyramid import PyramidSampler
from diffusion_pl.samplers.sampler import Integrator, Sampler


def read_images(paths: Sequence[Path], generator: ImageGenerator) -> Tensor:
    """Image files of the model's size, on its device.

    Args:
        paths: PNG, JPEG or WebP.
        generator: of the model.

    Returns:
        float32 (n, C, H, W) in [-1, 1].

    Raises:
        UserError: a file cannot be read or has another size.
    """
    channels, side, _ = generator.shape
    read = [
        read_square(read_named(path), side, "exact", where=str(path), channels=channels).copy()
        for path in paths
    ]
    return from_bytes(torch.stack([torch.from_numpy(each) for each in read])).to(generator.device)


def single_size_sampler(generator: ImageGenerator, command: str, base_alone: bool) -> Sampler:
    """The run's sampler; for a pyramid, with the user's consent, its base at full size.

    Args:
        generator: of the model.
        command: its name, for messages.
        base_alone: the option that gives the consent.

    Raises:
        UserError: a pyramid without consent, since its base samples other images; or consent
            without a pyramid.
    """
    sampler = generator.sampler
    if isinstance(sampler, PyramidSampler) and len(sampler.levels) > 1:  # one level is its base
        if not base_alone:
            raise UserError(
                f"{command}: works at one size, and the run samples over {len(sampler.levels)}; "
                f"--base-alone uses the pyramid's base sampler from noise at {generator.shape[1]} "
                "pixels, as no image of the run is sampled"
            )
    elif base_alone:
        raise UserError("--base-alone: the run samples at one size; leave it out")
    return base_sampler(generator)


def base_sampler(generator: ImageGenerator) -> Sampler:
    """The run's sampler; for a pyramid its base."""
    sampler = generator.sampler
    base = sampler.base if isinstance(sampler, PyramidSampler) else sampler
    assert isinstance(base, Sampler)
    return base


def ode_integrator(sampler: str | None, own: Integrator) -> Integrator:
    """The ODE integrator that `--sampler` names; when not given, Heun's method.

    Args:
        sampler: its name, or None.
        own: that of the run's sampler, with the options; if it is Heun's method in the time of flow
            matching, so is the default.

    Raises:
        UserError: one that adds noise, or a multistep method.
    """
    known = ("heun", "midpoint", "flow_heun", "euler", "ddim")
    scale = getattr(own, "keywords", {}).get("noise_scale")
    name = sampler or ("heun" if scale is None else "flow_heun")
    if name not in known:
        raise UserError(
            f"--sampler: {name} cannot be run in both directions, as {', '.join(known)} can"
        )
    return integrator(name) if name != "flow_heun" else partial(heun, noise_scale=scale)
