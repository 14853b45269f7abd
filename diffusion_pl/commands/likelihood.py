"""`likelihood`: bits per dimension of the run's data, by the flow or by the variational bound.

The number is the model's: the flow runs over all the levels that the network knows, on a grid of
its own, the bound over the chain that the objective names. The sampler has no part in either.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from diffusion_pl.commands import latents, runs
from diffusion_pl.data.source import Images
from diffusion_pl.diffusion.guidance import conditioned
from diffusion_pl.diffusion.objective import Denoise, trained_range
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.timesteps import Timesteps
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import batches
from diffusion_pl.images import from_bytes
from diffusion_pl.names import shown
from diffusion_pl.objectives.likelihood import chain_of, variational_bound
from diffusion_pl.samplers.flow_likelihood import (
    Refined,
    bits_per_dim,
    dequantised,
    grid,
    log_likelihood,
    rademacher,
    refined,
)

FAILURES: tuple[type[Exception], ...] = ()

BATCH = 50
# Bits per dimension are published to two digits.
TOLERANCE = 0.01
CLIP = True  # of the bound's denoised images, as published


def run(options: argparse.Namespace) -> int:
    """Measure the first images of the data; print the mean, and how sure it is."""
    opened = _opened(options)
    latents.at_one_size(opened.drawing, options)  # of a pyramid there is no such number
    images = runs.images_of(opened.model.config)
    _check_data(options, opened, images)
    if options.by == "bound":
        bits, about = _bound(options, opened, images)
    else:
        flow = _flow(options, opened, images)
        bits, about = flow.value, _flow_about(options, opened, flow)
    print(json.dumps(_errors(bits) | _row(options, opened, images) | about, indent=2))
    return 0


def _opened(options: argparse.Namespace) -> runs.Opened:
    """The run, unguided and by its own sampler, of which only the start is needed.

    Raises:
        UserError: counts that cannot be, or an option that has no part in a likelihood.
    """
    probes = 1 if options.probes is None else options.probes
    if options.count < 1 or probes < 0:
        raise UserError(
            f"--count must be positive, --probes at least 0 (got {options.count}, {probes})"
        )
    if options.steps is not None and options.steps < 2:
        raise UserError(f"--steps must be at least 2, a grid and one of half (got {options.steps})")
    bound = options.by == "bound"
    for name, given, why in (
        ("guidance", options.guidance not in (None, 1.0), "a guided model has no likelihood"),
        ("guide", options.guide is not None, "a guided model has no likelihood"),
        ("guidance-interval", options.guidance_interval is not None,
         "a guided model has no likelihood"),
        ("steps", bound and options.steps is not None, "the bound visits every timestep"),
        ("probes", bound and options.probes is not None, "the bound has no trace"),
        ("variance", not bound and options.variance is not None, "the flow has none"),
    ):  # fmt: skip
        if given:
            raise UserError(f"--{name}: {why}; leave it out")
    if options.sampler is not None:
        print("--sampler: the likelihood is the model's; no sampler changes it", file=sys.stderr)
    return runs.open_run(
        argparse.Namespace(**{**vars(options), "sampler": None, "steps": None, "guidance": 1.0})
    )


def _check_data(options: argparse.Namespace, opened: runs.Opened, images: Images) -> None:
    """See that the data are what the model is of.

    Raises:
        UserError: too few of them, of another shape, or without the model's labels.
    """
    drawing = opened.drawing
    if options.count > len(images):
        raise UserError(f"--count: {images.name} has {len(images):,} images")
    network: Any = opened.model.denoiser.network
    channels = images.shape[0]
    if channels != network.channels:
        raise UserError(f"{images.name} has {channels} channels, the model {network.channels}")
    try:
        network.check_resolution(*images.shape[1:])
    except ValueError as error:
        raise UserError(f"{images.name}: the model is not of its size: {error}") from error
    if drawing.classes and images.labels is None:
        raise UserError(f"{images.name} has no labels, and the model is one of classes")
    if drawing.classes and images.classes != drawing.classes:
        raise UserError(
            f"{images.name} has {images.classes} classes, and the model is of {drawing.classes}"
        )
    table = getattr(opened.model.objective.preconditioning, "timesteps", None)
    if options.by == "bound" and not isinstance(table, Timesteps):
        raise UserError(
            "--by bound: the run's objective has no table of timesteps; measure it by the flow"
        )


def _over(
    options: argparse.Namespace,
    opened: runs.Opened,
    images: Images,
    what: str,
    measure: Callable[[Tensor, Denoise, Sequence[int]], Tensor],
) -> Tensor:
    """What is measured of every image, a batch at a time: (count, probes) bits per dimension."""
    pieces = list(batches(range(options.count), options.batch_size or BATCH))
    console = Console(stderr=True)
    found = [
        measure(*_batch(opened, images, piece), piece).cpu()
        for piece in track(pieces, what, console=console, transient=True)
    ]
    bits = torch.cat(found)
    if not bool(torch.isfinite(bits).all()):
        raise UserError(f"{what}: is not finite; the weights are unfit")
    return bits


def _batch(opened: runs.Opened, images: Images, piece: Sequence[int]) -> tuple[Tensor, Denoise]:
    """Some images of the data and the model under their labels, unguided, in float32."""
    drawing = opened.drawing
    where = latents.device(drawing)
    indices = torch.tensor(list(piece))
    image = from_bytes(images.read(indices)).to(where)
    if not drawing.classes:
        return image, drawing.denoiser
    assert images.labels is not None
    return image, conditioned(drawing.denoiser, label=images.labels[indices].to(where))


def _flow(options: argparse.Namespace, opened: runs.Opened, images: Images) -> Refined:
    """Bits per dimension by the ODE, (count, probes), on a grid that is fine enough."""
    prior_std = _prior_std(options, opened)

    def measure(steps: int) -> Tensor:
        def of(image: Tensor, denoise: Denoise, piece: Sequence[int]) -> Tensor:
            return _flow_bits(opened, image, denoise, piece, options.probes, steps, prior_std)

        return _over(options, opened, images, f"likelihood, {steps} steps", of)

    if options.steps is None:
        flow = refined(measure, _allowed)
    else:
        coarse, value = measure(options.steps // 2), measure(options.steps)
        flow = Refined(value, options.steps, float((value - coarse).mean().abs()))
    if flow.change >= _allowed(flow.value):
        print(
            shown(
                f"likelihood: {flow.steps} steps moved it by {flow.change:.2g} from half as many, "
                f"more than {_allowed(flow.value):.2g}; take --steps {2 * flow.steps}"
            ),
            file=sys.stderr,
        )
    return flow


def _flow_bits(
    opened: runs.Opened,
    image: Tensor,
    denoise: Denoise,
    piece: Sequence[int],
    probes: int | None,
    steps: int,
    prior_std: float,
) -> Tensor:
    """Of one batch, (B, probes); the bins' noise is the same for every probe and every grid."""
    seed = opened.drawing.seed
    # The distribution function of normal noise is uniform.
    inside = torch.special.ndtr(ImageNoise(seed, piece, "bins")(image))
    spread = dequantised(image, inside)
    draw = ImageNoise(seed, piece, "probe")
    count = 1 if probes is None else probes
    values = [
        log_likelihood(
            denoise,
            spread,
            grid(trained_range(opened.model.objective), steps),
            rademacher(draw(image)) if count else None,
            prior_std=prior_std,
        )
        for _ in range(max(count, 1))
    ]
    return bits_per_dim(torch.stack(values, dim=1), image[0].numel())


def _prior_std(options: argparse.Namespace, opened: runs.Opened) -> float:
    """Of the state at the highest level: what the run's sampler begins from there."""
    highest = trained_range(opened.model.objective)[1]
    unit = latents.at_one_size(opened.drawing, options).unit_start
    return math.sqrt(1 + highest**2) if unit else highest


def _allowed(bits: Tensor) -> float:
    """The change of the mean that is small enough: of the mean's own error, and of what is read."""
    error = _errors(bits)["standard_error"]
    return TOLERANCE if error is None else min(TOLERANCE, error)


def _bound(
    options: argparse.Namespace, opened: runs.Opened, images: Images
) -> tuple[Tensor, dict[str, Any]]:
    """Bits per dimension of the variational bound, (count, 1), and which chain's it is."""
    objective = opened.model.objective
    table: Any = objective.preconditioning.timesteps  # type: ignore[attr-defined]
    chain = chain_of(objective)
    variance = options.variance or ("large" if chain is None else chain.variance)

    def measure(image: Tensor, denoise: Denoise, piece: Sequence[int]) -> Tensor:
        draw = ImageNoise(opened.drawing.seed, piece, "bound", image.device)
        bound = variational_bound(denoise, image, table, draw, variance=variance, clip=CLIP)
        return bound.total[:, None]

    bits = _over(options, opened, images, "bound", measure)
    return bits, {"variance": variance, "clip": CLIP, "timesteps": table.T}


def _errors(bits: Tensor) -> dict[str, Any]:
    """The mean over images and how sure it is."""
    count, probes = bits.shape
    each = bits.mean(dim=1)
    return {
        "bits_per_dim": float(each.mean()),
        # Of the mean over images drawn like these, and the part of it that is the probes'.
        "standard_error": float(each.std() / math.sqrt(count)) if count > 1 else None,
        "probes_error": float(bits.var(dim=1).mean().sqrt() / math.sqrt(count * probes))
        if probes > 1
        else None,
    }


def _row(options: argparse.Namespace, opened: runs.Opened, images: Images) -> dict[str, Any]:
    """What the number is of."""
    about = opened.about()
    return {
        "by": options.by,
        "count": options.count,
        "data": images.name,
        "fingerprint": images.fingerprint,
        **{key: about[key] for key in ("checkpoint", "images_seen", "seed")},
        "weights": options.weights,
    }


def _flow_about(options: argparse.Namespace, opened: runs.Opened, flow: Refined) -> dict[str, Any]:
    """What the flow's number depends on beside: range, grid, prior, and what half the grid says."""
    low, high = trained_range(opened.model.objective)
    return {
        "probes": 1 if options.probes is None else options.probes,
        "sigma": [low, high],
        "prior_std": _prior_std(options, opened),
        "steps": flow.steps,
        "steps_error": flow.change,
        "evaluations": 2 * flow.steps,
    }
