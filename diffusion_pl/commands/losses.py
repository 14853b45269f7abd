"""`losses`: the error of a run's averaged and raw weights at each noise level, with a plot."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusion_pl import config
from diffusion_pl.commands import data_sets, runs
from diffusion_pl.commands.options import Integer, RunOptions, RunPath, SamplerOptions
from diffusion_pl.commands.results import Result
from diffusion_pl.diffusion.conditions import received
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.levels import LevelError, errors_by_level, spaced_levels
from diffusion_pl.evaluation.sources import own_condition
from diffusion_pl.images import ImageDataset, from_bytes
from diffusion_pl.io.files import write_atomically
from diffusion_pl.names import shown

WEIGHTS = ("ema", "denoiser")
LOSSES = "losses.json"  # beside the plot, the result


def command(
    run: RunPath,
    /,
    *,
    data: str | None = None,
    count: Integer = 256,
    levels: Integer = 20,
    out: Path | None = None,
    options: RunOptions = RunOptions(),
) -> Result:
    """Measure the error of averaged and raw weights at each noise level, with a plot.

    Both see the same images and noise.

    Example: diffusion_pl losses runs/mine --data data/test

    Args:
        data: other images than the run's, such as a test set.
        count: number of images.
        levels: number of noise levels, evenly spaced in log sigma.
        out: folder of plot and numbers; RUN/losses when not given.
    """
    if count < 2 or levels < 2:
        raise UserError(f"--count and --levels must be at least 2 (got {count}, {levels})")
    curves, about, home = measured(run, data, count, levels, options)
    if about["count"] < count:
        text = f"{about['data']}: has {about['count']:,} images, fewer than {count:,}"
        print(shown(text), file=sys.stderr)
    folder = out or home / "losses"
    folder.mkdir(parents=True, exist_ok=True)
    plot(curves, folder / "losses.png")
    found = {**about, "plot": str(folder / "losses.png"), "levels": rows_of(curves)}
    text = f"{json.dumps(found, indent=1)}\n"
    write_atomically(folder / LOSSES, lambda file: file.write(text.encode()))
    return Result(found, indent=2)


def measured(
    run: Path, data: str | None, count: int, levels: int, options: RunOptions
) -> tuple[dict[str, list[LevelError]], dict[str, Any], Path]:
    """The errors of averaged and raw weights, what they are of, and the run's folder.

    Raises:
        UserError: there is no run, or no fit data.
    """
    curves: dict[str, list[LevelError]] = {}
    about: dict[str, Any] = {}
    for weights in WEIGHTS:
        # Unguided.
        sampling = SamplerOptions(guidance=1.0, weights=weights)
        opened = runs.open_run(run, sampling, options, None)
        images = _images(data, opened.model)
        if not about:
            about = {
                **opened.about(),
                "data": images.name,
                "count": min(count, len(images)),
            }
        curves[weights] = _curve(opened, images, about["count"], levels, options.batch_size)
    return curves, about, opened.folder


def rows_of(curves: Mapping[str, Sequence[LevelError]]) -> dict[str, list[dict[str, float]]]:
    """The curves as a result of the command has them."""
    return {name: [dataclasses.asdict(level) for level in curve] for name, curve in curves.items()}


def _images(data: str | None, model: runs.Model) -> ImageDataset:
    if data is not None:
        side = config.build(model.config, "data.dataset").resolution
        encoder = model.encoder.name if model.encoder is not None else None
        return data_sets.images_of(data, side, text=encoder)
    return runs.images_of(model.config)


def _curve(
    opened: runs.OpenedRun, images: ImageDataset, count: int, levels: int, batch_size: int | None
) -> list[LevelError]:
    """The errors on images evenly spaced over the set, at levels evenly spaced in log sigma."""
    generator = opened.generator
    if images.shape[1:] != generator.shape:
        raise UserError(
            f"{images.name}: images are {tuple(images.shape[1:])}, the run's {generator.shape}"
        )
    indices = torch.arange(count) * len(images) // count
    clean = from_bytes(images.read(indices)).to(generator.device)
    model = opened.model
    own = own_condition(images, indices, model.taken, model.degradation, model.encoder)
    condition = received(generator.denoiser.network, own)
    sigmas = spaced_levels(opened.model.objective.preconditioning.sigma_range, levels)
    with generator.inference():
        return errors_by_level(
            generator.denoiser,
            clean,
            sigmas,
            condition={key: value.to(generator.device) for key, value in condition.items()},
            sigma_data=clean.std().item(),
            seed=generator.seed,
            batch_size=batch_size or 64,
        )


def plot(curves: dict[str, list[LevelError]], path: Path) -> None:
    """Plot the weighted error against the noise level, one line for each kind of weights."""
    import matplotlib.pyplot as plt  # a second of CPU

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        sigmas = [level.sigma for level in curve]
        label = "averaged weights" if name == "ema" else "raw weights"
        axes.plot(sigmas, [level.loss for level in curve], style, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="noise level sigma",
        ylabel="error / (sigma² sd² / (sigma² + sd²))",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
