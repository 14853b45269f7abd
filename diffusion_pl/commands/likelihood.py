"""`likelihood`: bits per dimension of the run's data, by the flow or by the variational bound."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from diffusion_pl.commands import latents, runs, trust
from diffusion_pl.data.source import Images, Source
from diffusion_pl.diffusion.guidance import conditioned
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.timesteps import Timesteps
from diffusion_pl.evaluation import batches
from diffusion_pl.images import from_bytes
from diffusion_pl.objectives.likelihood import variational_bound
from diffusion_pl.samplers.flow_likelihood import (
    bits_per_dim,
    dequantised,
    log_likelihood,
    rademacher,
)

FAILURES: tuple[type[Exception], ...] = ()

BATCH = 50


def run(options: argparse.Namespace) -> int:
    """Measure the first images of the data; print the mean, and how sure it is."""
    if options.count < 1 or options.probes < 0:
        raise ValueError(
            f"--count must be positive, --probes at least 0 (got {options.count}, {options.probes})"
        )
    opened = runs.open_run(options)
    source: Source = trust.data_of(opened.model.config)
    source.prepare()
    images = source.open()
    if options.count > len(images):
        raise ValueError(f"--count: {images.name} has {len(images):,} images")
    table = getattr(opened.model.objective.preconditioning, "timesteps", None)
    if options.by == "bound" and not isinstance(table, Timesteps):
        raise ValueError(
            "--by bound: the run's objective has no table of timesteps; measure it by the flow"
        )
    measured = []
    pieces = list(batches(range(options.count), options.batch_size or BATCH))
    for piece in track(pieces, "likelihood", console=Console(stderr=True), transient=True):
        image, denoise = _batch(opened, images, piece)
        if options.by == "bound":
            assert isinstance(table, Timesteps)
            found = _bound(opened, image, denoise, table, piece)
        else:
            found = _flow(opened, image, denoise, piece, options.probes)
        measured.append(found.cpu())
    print(json.dumps(_result(options, opened, images, torch.cat(measured)), indent=2))
    return 0


def _batch(opened: runs.Opened, images: Images, piece: Sequence[int]) -> tuple[Tensor, Denoise]:
    """Some images of the data and the model under their labels, unguided, in float32."""
    drawing = opened.drawing
    where = latents.device(drawing)
    indices = torch.tensor(list(piece))
    image = from_bytes(images.read(indices)).to(where)
    if not drawing.classes:
        return image, drawing.denoiser
    if images.labels is None:
        raise ValueError(f"{images.name} has no labels, and the model is one of classes")
    return image, conditioned(drawing.denoiser, label=images.labels[indices].to(where))


def _flow(
    opened: runs.Opened, image: Tensor, denoise: Denoise, piece: Sequence[int], probes: int
) -> Tensor:
    """Bits per dimension by the ODE, (B, probes); the bins' noise is the same for every probe."""
    drawing = opened.drawing
    sampler = latents.at_one_size(drawing)
    # The distribution function of normal noise is uniform.
    inside = torch.special.ndtr(ImageNoise(drawing.seed, piece, "bins")(image))
    spread = dequantised(image, inside)
    draw = ImageNoise(drawing.seed, piece, "probe")
    values = [
        log_likelihood(
            denoise,
            spread,
            sampler.sigmas(),
            rademacher(draw(image)) if probes else None,
            prior_std=sampler.start_std,
        )
        for _ in range(max(probes, 1))
    ]
    return bits_per_dim(torch.stack(values, dim=1), image[0].numel())


def _bound(
    opened: runs.Opened, image: Tensor, denoise: Denoise, table: Timesteps, piece: Sequence[int]
) -> Tensor:
    """Bits per dimension of the variational bound, (B, 1)."""
    sampler = latents.at_one_size(opened.drawing)
    variance = getattr(sampler.integrate, "keywords", {}).get("variance", "small")
    draw = ImageNoise(opened.drawing.seed, piece, "bound", image.device)
    bound = variational_bound(denoise, image, table, draw, variance=variance, clip=sampler.clip)
    return bound.total[:, None]


def _result(
    options: argparse.Namespace, opened: runs.Opened, images: Images, bits: Tensor
) -> dict[str, Any]:
    """The mean over images and what it depends on."""
    count, probes = bits.shape
    each = bits.mean(dim=1)
    sampler = latents.at_one_size(opened.drawing)
    result = {
        "bits_per_dim": float(each.mean()),
        # Of the mean over images drawn like these, and the part of it that is the probes'.
        "standard_error": float(each.std() / math.sqrt(count)) if count > 1 else None,
        "probes_error": float(bits.var(dim=1).mean().sqrt() / math.sqrt(count * probes))
        if probes > 1
        else None,
        "by": options.by,
        "count": count,
        "data": images.name,
        "fingerprint": images.fingerprint,
    }
    about = {key: opened.about()[key] for key in ("checkpoint", "images_seen", "seed")}
    if options.by == "bound":
        return {**result, **about, "weights": options.weights}
    sigmas = sampler.sigmas()
    steps = len(sigmas) - 2
    return {
        **result,
        **about,
        "weights": options.weights,
        "probes": options.probes,
        "sigma": [float(sigmas[-2]), float(sigmas[0])],
        "steps": steps,
        "evaluations": 2 * steps,
    }
