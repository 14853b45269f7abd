"""A trained run opened for drawing: its config read with care, its weights, its sampler."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_pl import config
from diffusion_pl.commands import parts
from diffusion_pl.config import Config
from diffusion_pl.diffusion.objective import TrainingObjective
from diffusion_pl.evaluation import Drawing
from diffusion_pl.samplers.named import named
from diffusion_pl.samplers.sampler import Sampler
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.settings import AUTOCAST, Settings, resolve_precision


@dataclass(frozen=True)
class Opened:
    """A checkpoint with what its config builds.

    Args:
        folder: the run's folder.
        checkpoint: the file.
        images: images that its weights have seen.
        config: the run's, with the command's overrides.
        drawing: the denoiser on its device, with its sampler.
    """

    folder: Path
    checkpoint: Path
    images: int
    config: Config
    drawing: Drawing


def open_run(options: argparse.Namespace, **drawing: Any) -> Opened:
    """Open what the command line names.

    Args:
        options: of `sample` or `evaluate`.
        drawing: further settings of the Drawing.

    Raises:
        ValueError: no run there, one that is unfit, or a setting that does not fit it.
    """
    path = checkpoint_of(options.run)
    folder = path.parent.parent
    loaded = checkpoints.load(path)
    section = loaded[checkpoints.SECTION]
    experiment = config.load_resolved(section["config"], str(path), options.allow, options.set)
    parts.bind(experiment)
    objective: TrainingObjective = config.build(experiment, "objective")
    denoiser = objective.denoiser(config.build(experiment, "network"))
    checkpoints.load_weights(denoiser, loaded, options.weights, path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    device = device if options.device == "auto" else options.device
    denoiser.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    data = config.build(experiment, "data")
    settings: Settings = config.build(experiment, "trainer")
    precision = resolve_precision(settings.precision, torch.device(device).type)
    guidance = experiment.get("evaluation").get("guidance", 1.0)
    return Opened(
        folder=folder,
        checkpoint=path,
        images=section["images"],
        config=experiment,
        drawing=Drawing(
            denoiser=denoiser,
            sampler=_sampler(options, experiment, objective),
            shape=(data.channels, data.resolution, data.resolution),
            classes=denoiser.network.classes,  # type: ignore[arg-type]
            seed=options.seed,
            guidance=guidance if options.guidance is None else options.guidance,
            precision=AUTOCAST[precision],
            **drawing,
        ),
    )


def checkpoint_of(run: Path) -> Path:
    """The checkpoint that a run's folder or a file names.

    Raises:
        ValueError: there is none.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise ValueError(f"{run}: there is no such run; runs lie under {parts.RUNS}/")
    latest = checkpoints.latest(run / "checkpoints")
    if latest is None:
        raise ValueError(f"{run}: has no checkpoint yet; train it first")
    return latest


def _sampler(
    options: argparse.Namespace, experiment: Config, objective: TrainingObjective
) -> Sampler:
    """The run's own sampler, or the one that the command line names for the network's levels."""
    if options.sampler:
        return named(options.sampler, objective.preconditioning.sigma_range, options.steps)
    if options.steps:
        experiment.tree["sampler"]["steps"] = options.steps
    return parts.sampler_of(experiment, objective)
