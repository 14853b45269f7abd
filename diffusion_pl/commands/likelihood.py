"""`likelihood`: bits per dimension of the run's data, by the flow or by the variational bound.

Both are independent of the sampler: the flow runs over the trained range of noise levels on its own
grid, the bound over the objective's timesteps.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_pl.commands import latents, runs
from diffusion_pl.commands.options import BaseAlone, Integer, RunOptions, RunPath, SamplerOptions
from diffusion_pl.commands.results import Result
from diffusion_pl.diffusion.classifier_free import conditioned
from diffusion_pl.diffusion.conditions import received
from diffusion_pl.diffusion.objective import Denoise, trained_range
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.timesteps import Timesteps
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import batches
from diffusion_pl.evaluation.sources import own_condition
from diffusion_pl.images import ImageDataset, from_bytes
from diffusion_pl.names import shown
from diffusion_pl.objectives.likelihood import Variance, chain_of, variational_bound
from diffusion_pl.progress import track
from diffusion_pl.samplers.flow_likelihood import (
    Refined,
    bits_per_dim,
    dequantised,
    grid,
    log_likelihood,
    rademacher,
    refined,
)

BATCH = 50
TOLERANCE = 0.01  # bits per dimension, which are published to two digits
CLIP = True  # the bound's denoised images, as published


@dataclasses.dataclass(frozen=True)
class Data:
    """The images whose likelihood is computed.

    Args:
        opened: the run.
        images: its data.
        count: of images, the first ones.
        batch_size: images per batch.
    """

    opened: runs.OpenedRun
    images: ImageDataset
    count: int
    batch_size: int


def command(
    run: RunPath,
    /,
    *,
    count: Integer = 100,
    by: Literal["flow", "bound"] = "flow",
    probes: Integer | None = None,
    variance: Literal["small", "large", "learned"] | None = None,
    base_alone: BaseAlone = False,
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Compute bits per dimension of the data under a run, with standard errors.

    Example: diffusion_pl likelihood runs/mine --count 1000

    Args:
        count: number of images, the first of the data.
        by: the probability-flow ODE, or DDPM's variational bound.
        probes: of the trace estimate for each image; 0: exact trace; 1 when not given.
        variance: of the bound's reverse steps; the objective's, else large, when not given.
    """
    _check_options(count, by, probes, variance, sampling, options)
    # Unguided; of the sampler only the start is used.
    plain = SamplerOptions(guidance=1.0, weights=sampling.weights)
    opened = runs.open_run(run, plain, options, None)
    unit_start = latents.single_size_sampler(opened.generator, "likelihood", base_alone).unit_start
    images = runs.images_of(opened.model.config)
    _check_data(opened, images, count, by)
    data = Data(opened, images, count, options.batch_size or BATCH)
    if by == "bound":
        bits, about = _bound(data, variance)
    else:
        probes, prior_std = 1 if probes is None else probes, _prior_std(opened, unit_start)
        flow = _flow(data, probes, sampling.steps, prior_std)
        bits, about = flow.value, _flow_about(opened, probes, prior_std, flow)
    return Result({**_errors(bits), **_row(data, by, sampling.weights), **about}, indent=2)


def _check_options(
    count: int,
    by: str,
    probes: int | None,
    variance: str | None,
    sampling: SamplerOptions,
    options: RunOptions,
) -> None:
    """Refuse numbers out of range, and options that have no effect.

    Raises:
        UserError: names the option.
    """
    least = 1 if probes is None else probes
    if count < 1 or least < 0:
        raise UserError(f"--count must be positive, --probes at least 0 (got {count}, {least})")
    if sampling.steps is not None and sampling.steps < 2:
        raise UserError(
            f"--steps must be at least 2, for a grid and its half (got {sampling.steps})"
        )
    bound = by == "bound"
    for name, given, why in (
        ("guidance", sampling.guidance not in (None, 1.0), "a guided model has no likelihood"),
        ("guide", options.guide is not None, "a guided model has no likelihood"),
        ("guidance-interval", options.guidance_interval is not None,
         "a guided model has no likelihood"),
        ("steps", bound and sampling.steps is not None, "the bound visits every timestep"),
        ("probes", bound and probes is not None, "the bound has no trace"),
        ("variance", not bound and variance is not None, "the flow has none"),
    ):  # fmt: skip
        if given:
            raise UserError(f"--{name}: {why}; leave it out")
    if sampling.sampler is not None:
        print("--sampler: has no effect on the likelihood", file=sys.stderr)


def _check_data(opened: runs.OpenedRun, images: ImageDataset, count: int, by: str) -> None:
    """Check that the data fits the model.

    Raises:
        UserError: too few images, another shape, or other or no labels.
    """
    if count > len(images):
        raise UserError(f"--count: {images.name} has {len(images):,} images")
    network: Any = opened.model.denoiser.network
    if images.channels != network.channels:
        raise UserError(
            f"{images.name} has {images.channels} channels, the model {network.channels}"
        )
    try:
        network.check_resolution(images.resolution, images.resolution)
    except ValueError as error:
        raise UserError(f"{images.name}: the model does not take its size: {error}") from error
    _own(opened, images, torch.zeros(0, dtype=torch.int64))
    table = getattr(opened.model.objective.preconditioning, "timesteps", None)
    if by == "bound" and not isinstance(table, Timesteps):
        raise UserError("--by bound: the run's objective has no discrete timesteps; use --by flow")


def _over(
    data: Data, what: str, measure: Callable[[Tensor, Denoise, Sequence[int]], Tensor]
) -> Tensor:
    """Bits per dimension of every image, (count, probes), batch by batch."""
    pieces = list(batches(range(data.count), data.batch_size))
    found = [
        measure(*_batch(data.opened, data.images, piece), piece).cpu()
        for piece in track(pieces, what)
    ]
    bits = torch.cat(found)
    if not bool(torch.isfinite(bits).all()):
        raise UserError(f"{what}: is not finite; the weights are unfit")
    return bits


def _batch(
    opened: runs.OpenedRun, images: ImageDataset, piece: Sequence[int]
) -> tuple[Tensor, Denoise]:
    """A batch of images and the unguided denoiser with their conditions, in float32."""
    generator = opened.generator
    indices = torch.tensor(list(piece))
    image = from_bytes(images.read(indices)).to(generator.device)
    own = received(generator.denoiser.network, _own(opened, images, indices))
    condition = {key: value.to(generator.device) for key, value in own.items()}
    return image, conditioned(generator.denoiser, **condition)


def _own(opened: runs.OpenedRun, images: ImageDataset, indices: Tensor) -> dict[str, Tensor]:
    model = opened.model
    return own_condition(images, indices, model.taken, model.degradation, model.encoder)


def _flow(data: Data, probes: int, steps: int | None, prior_std: float) -> Refined:
    """Bits per dimension by the ODE, (count, probes), on a sufficiently fine grid."""

    def measure(number: int) -> Tensor:
        def of(image: Tensor, denoise: Denoise, piece: Sequence[int]) -> Tensor:
            return _flow_bits(data.opened, image, denoise, piece, probes, number, prior_std)

        return _over(data, f"likelihood, {number} steps", of)

    if steps is None:
        flow = refined(measure, _allowed)
    else:
        coarse, value = measure(steps // 2), measure(steps)
        flow = Refined(value, steps, float((value - coarse).mean().abs()))
    if flow.change >= _allowed(flow.value):
        print(
            shown(
                f"likelihood: {flow.steps} steps changed it by {flow.change:.2g} against half as "
                f"many, more than {_allowed(flow.value):.2g}; use --steps {2 * flow.steps}"
            ),
            file=sys.stderr,
        )
    return flow


def _flow_bits(
    opened: runs.OpenedRun,
    image: Tensor,
    denoise: Denoise,
    piece: Sequence[int],
    probes: int,
    steps: int,
    prior_std: float,
) -> Tensor:
    """Bits per dimension of one batch, (B, probes), dequantised alike for all probes and grids."""
    seed = opened.generator.seed
    # The normal distribution function of normal noise is uniform.
    uniform = torch.special.ndtr(ImageNoise(seed, piece, "bins")(image))
    continuous = dequantised(image, uniform)
    draw = ImageNoise(seed, piece, "probe")
    values = [
        log_likelihood(
            denoise,
            continuous,
            grid(trained_range(opened.model.objective), steps),
            rademacher(draw(image)) if probes else None,
            prior_std=prior_std,
        )
        for _ in range(max(probes, 1))
    ]
    return bits_per_dim(torch.stack(values, dim=1), image[0].numel())


def _prior_std(opened: runs.OpenedRun, unit_start: bool) -> float:
    """Std of the state at the highest sigma, where the run's sampler starts."""
    highest = trained_range(opened.model.objective)[1]
    return math.sqrt(1 + highest**2) if unit_start else highest


def _allowed(bits: Tensor) -> float:
    """The accepted change of the mean: the tolerance, or its standard error if smaller."""
    error = _errors(bits)["standard_error"]
    return TOLERANCE if error is None else min(TOLERANCE, error)


def _bound(data: Data, variance: Variance | None) -> tuple[Tensor, dict[str, Any]]:
    """Bits per dimension by the variational bound, (count, 1), and its settings."""
    objective = data.opened.model.objective
    table: Any = objective.preconditioning.timesteps  # type: ignore[attr-defined]
    chain = chain_of(objective)
    which: Variance = variance or ("large" if chain is None else chain.variance)

    def measure(image: Tensor, denoise: Denoise, piece: Sequence[int]) -> Tensor:
        draw = ImageNoise(data.opened.generator.seed, piece, "bound", image.device)
        bound = variational_bound(denoise, image, table, draw, variance=which, clip=CLIP)
        return bound.total[:, None]

    bits = _over(data, "bound", measure)
    return bits, {"variance": which, "clip": CLIP, "timesteps": table.T}


def _errors(bits: Tensor) -> dict[str, Any]:
    """The mean over images and its standard errors."""
    count, probes = bits.shape
    each = bits.mean(dim=1)
    return {
        "bits_per_dim": float(each.mean()),
        # Of the mean over images, and the part of it that is due to the probes.
        "standard_error": float(each.std() / math.sqrt(count)) if count > 1 else None,
        "probes_error": float(bits.var(dim=1).mean().sqrt() / math.sqrt(count * probes))
        if probes > 1
        else None,
    }


def _row(data: Data, by: str, weights: str) -> dict[str, Any]:
    """The data and the model of the number."""
    about = data.opened.about()
    return {
        "by": by,
        "count": data.count,
        "data": data.images.name,
        "fingerprint": data.images.fingerprint,
        **{key: about[key] for key in ("checkpoint", "images_seen", "seed")},
        "weights": weights,
    }


def _flow_about(
    opened: runs.OpenedRun, probes: int, prior_std: float, flow: Refined
) -> dict[str, Any]:
    """The range, grid and prior of the flow, and the error estimated from half the grid."""
    low, high = trained_range(opened.model.objective)
    return {
        "probes": probes,
        "sigma": [low, high],
        "prior_std": prior_std,
        "steps": flow.steps,
        "steps_error": flow.change,
        "evaluations": 2 * flow.steps,
    }
