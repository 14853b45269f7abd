"""`likelihood`: bits per dimension of the run's data, by the flow or by the variational bound.

The number is the model's: the flow runs over all the levels that the network knows, on a grid of
its own, the bound over the chain that the objective names. The sampler has no part in either.
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
from diffusion_pl.commands.options import BaseAlone, RunOptions, RunPath, SamplerOptions
from diffusion_pl.commands.results import Result
from diffusion_pl.diffusion.guidance import conditioned
from diffusion_pl.diffusion.objective import Denoise, trained_range
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.timesteps import Timesteps
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import batches
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
# Bits per dimension are published to two digits.
TOLERANCE = 0.01
CLIP = True  # of the bound's denoised images, as published


@dataclasses.dataclass(frozen=True)
class Data:
    """Whose likelihood is measured.

    Args:
        opened: the run.
        images: of its data.
        count: of them, the first.
        batch_size: images at a time.
    """

    opened: runs.OpenedRun
    images: ImageDataset
    count: int
    batch_size: int


def command(
    run: RunPath,
    /,
    *,
    count: int = 100,
    by: Literal["flow", "bound"] = "flow",
    probes: int | None = None,
    variance: Literal["small", "large", "learned"] | None = None,
    base_alone: BaseAlone = False,
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Measure bits per dimension of the data under a run, and how sure they are.

    Example: diffusion_pl likelihood runs/mine --count 1000

    Args:
        count: images of the data, the first.
        by: ODE, or DDPM's variational bound.
        probes: of the trace, an image; 0: exactly; 1 when not given.
        variance: of the bound's reverse steps; what the objective trains, large where it trains
            none, when not given.
    """
    _check_options(count, by, probes, variance, sampling, options)
    # Unguided and by the run's own sampler, of which only the start is needed.
    opened = runs.open_run(run, SamplerOptions(guidance=1.0, weights=sampling.weights), options)
    # Of a pyramid there is no such number.
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
    """See that every option has a part in a likelihood.

    Raises:
        UserError: counts that cannot be, or an option that has none.
    """
    least = 1 if probes is None else probes
    if count < 1 or least < 0:
        raise UserError(f"--count must be positive, --probes at least 0 (got {count}, {least})")
    if sampling.steps is not None and sampling.steps < 2:
        raise UserError(
            f"--steps must be at least 2, a grid and one of half (got {sampling.steps})"
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
        print("--sampler: the likelihood is the model's; no sampler changes it", file=sys.stderr)


def _check_data(opened: runs.OpenedRun, images: ImageDataset, count: int, by: str) -> None:
    """See that the data are what the model is of.

    Raises:
        UserError: too few of them, of another shape, or without the model's labels.
    """
    generator = opened.generator
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
        raise UserError(f"{images.name}: the model is not of its size: {error}") from error
    if generator.classes and images.labels is None:
        raise UserError(f"{images.name} has no labels, and the model is one of classes")
    if generator.classes and images.classes != generator.classes:
        raise UserError(
            f"{images.name} has {images.classes} classes, and the model is of {generator.classes}"
        )
    table = getattr(opened.model.objective.preconditioning, "timesteps", None)
    if by == "bound" and not isinstance(table, Timesteps):
        raise UserError(
            "--by bound: the run's objective has no table of timesteps; measure it by the flow"
        )


def _over(
    data: Data, what: str, measure: Callable[[Tensor, Denoise, Sequence[int]], Tensor]
) -> Tensor:
    """What is measured of every image, a batch at a time: (count, probes) bits per dimension."""
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
    """Some images of the data and the model under their labels, unguided, in float32."""
    generator = opened.generator
    where = generator.device
    indices = torch.tensor(list(piece))
    image = from_bytes(images.read(indices)).to(where)
    if not generator.classes:
        return image, generator.denoiser
    assert images.labels is not None
    return image, conditioned(generator.denoiser, label=images.labels[indices].to(where))


def _flow(data: Data, probes: int, steps: int | None, prior_std: float) -> Refined:
    """Bits per dimension by the ODE, (count, probes), on a grid that is fine enough."""

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
                f"likelihood: {flow.steps} steps moved it by {flow.change:.2g} from half as many, "
                f"more than {_allowed(flow.value):.2g}; take --steps {2 * flow.steps}"
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
    """Of one batch, (B, probes); the bins' noise is the same for every probe and every grid."""
    seed = opened.generator.seed
    # The distribution function of normal noise is uniform.
    inside = torch.special.ndtr(ImageNoise(seed, piece, "bins")(image))
    spread = dequantised(image, inside)
    draw = ImageNoise(seed, piece, "probe")
    values = [
        log_likelihood(
            denoise,
            spread,
            grid(trained_range(opened.model.objective), steps),
            rademacher(draw(image)) if probes else None,
            prior_std=prior_std,
        )
        for _ in range(max(probes, 1))
    ]
    return bits_per_dim(torch.stack(values, dim=1), image[0].numel())


def _prior_std(opened: runs.OpenedRun, unit_start: bool) -> float:
    """Of the state at the highest level: what the run's sampler begins from there."""
    highest = trained_range(opened.model.objective)[1]
    return math.sqrt(1 + highest**2) if unit_start else highest


def _allowed(bits: Tensor) -> float:
    """The change of the mean that is small enough: of the mean's own error, and of what is read."""
    error = _errors(bits)["standard_error"]
    return TOLERANCE if error is None else min(TOLERANCE, error)


def _bound(data: Data, variance: Variance | None) -> tuple[Tensor, dict[str, Any]]:
    """Bits per dimension of the variational bound, (count, 1), and which chain's it is."""
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


def _row(data: Data, by: str, weights: str) -> dict[str, Any]:
    """What the number is of."""
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
    """What the flow's number depends on beside: range, grid, prior, and what half the grid says."""
    low, high = trained_range(opened.model.objective)
    return {
        "probes": probes,
        "sigma": [low, high],
        "prior_std": prior_std,
        "steps": flow.steps,
        "steps_error": flow.change,
        "evaluations": 2 * flow.steps,
    }
