"""`losses`: the error of a run's weights, averaged and raw, at each noise level; with a plot."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from diffusion_pl import config
from diffusion_pl.commands import data_sets, runs
from diffusion_pl.data.source import Images
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.levels import LevelError, errors_by_level
from diffusion_pl.images import from_bytes
from diffusion_pl.names import shown

FAILURES: tuple[type[Exception], ...] = ()

WEIGHTS = ("ema", "denoiser")


def run(options: argparse.Namespace) -> int:
    """Measure both kinds of weights on the same images and noise."""
    if options.count < 2 or options.levels < 2:
        raise UserError(
            f"--count and --levels must be at least 2 (got {options.count}, {options.levels})"
        )
    curves: dict[str, list[LevelError]] = {}
    about: dict[str, Any] = {}
    for weights in WEIGHTS:
        options.weights = weights
        opened = runs.open_run(options)
        images = _images(options, opened.model.config)
        if not about:
            about = {
                **opened.about(),
                "data": images.name,
                "count": min(options.count, len(images)),
            }
        curves[weights] = _curve(options, opened, images)
    if about["count"] < options.count:
        text = f"{about['data']}: has {about['count']:,} images; losses of these"
        print(shown(f"{text}, not of {options.count:,}"), file=sys.stderr)
    folder: Path = options.out or opened.folder / "losses"
    folder.mkdir(parents=True, exist_ok=True)
    plot(curves, folder / "losses.png")
    print(
        json.dumps(
            {
                **about,
                "plot": str(folder / "losses.png"),
                "levels": {
                    name: [dataclasses.asdict(level) for level in curve]
                    for name, curve in curves.items()
                },
            },
            indent=2,
        )
    )
    return 0


def _images(options: argparse.Namespace, experiment: config.Config) -> Images:
    if options.data is not None:
        side = config.build(experiment, "data").resolution
        return data_sets.images_of(options.data, side)
    return runs.images_of(experiment)


def _curve(options: argparse.Namespace, opened: runs.Opened, images: Images) -> list[LevelError]:
    """The errors on images spread evenly over the set, at levels even in log sigma."""
    drawing = opened.drawing
    if images.shape != drawing.shape:
        raise UserError(f"{images.name}: images are {images.shape}, the run's {drawing.shape}")
    count = min(options.count, len(images))
    indices = torch.arange(count) * len(images) // count
    clean = from_bytes(images.read(indices)).to(drawing.device)
    labels = None
    if drawing.classes:
        if images.labels is None:
            raise UserError(f"{images.name}: has no labels, and the run is of {drawing.classes}")
        labels = images.labels[indices].to(drawing.device)
    low, high = opened.model.objective.preconditioning.sigma_range
    ends = torch.tensor([max(low, 0.002), min(high, 80.0)], dtype=torch.float64).log()
    sigmas = torch.linspace(ends[0].item(), ends[1].item(), options.levels).exp().tolist()
    with torch.autocast(drawing.device.type, drawing.precision, enabled=bool(drawing.precision)):
        return errors_by_level(
            drawing.denoiser,
            clean,
            sigmas,
            labels=labels,
            sigma_data=clean.std().item(),
            seed=options.seed,
            batch_size=options.batch_size or 64,
        )


def plot(curves: dict[str, list[LevelError]], path: Path) -> None:
    """Draw the weighted error against the level, a line a kind of weights."""
    import matplotlib.pyplot as plt  # a second of CPU

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        sigmas = [level.sigma for level in curve]
        said = "averaged weights" if name == "ema" else "raw weights"
        axes.plot(sigmas, [level.loss for level in curve], style, label=said)
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
