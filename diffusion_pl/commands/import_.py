"""`import`: make a run of a published checkpoint, to sample, evaluate and fine-tune like any."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_pl import config
from diffusion_pl.commands import parts
from diffusion_pl.config import Config
from diffusion_pl.diffusion.objective import TrainingObjective
from diffusion_pl.interop import weights as ours
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.writing import write_atomically

FAILURES: tuple[type[Exception], ...] = ()


def run(options: argparse.Namespace) -> int:
    """Write DEST/config.yaml and DEST/checkpoints, and say how to go on, as one JSON object."""
    dest: Path = options.dest
    if dest.exists() and any(dest.iterdir()):
        raise ValueError(f"{dest}: is not empty; name another folder")
    images, about = 0, {"kind": options.kind, "from": str(options.source)}
    if options.kind == "safetensors":
        known, state = ours.read(options.source)
        images = known["images"]
        experiment = config.load_resolved(known["config"], str(options.source), options.allow)
    else:
        experiment, state = published(options)
    parts.bind(experiment)
    check(experiment, state, options.source)
    about["sha256"] = digest(options.source)
    path = write(dest, experiment, state, images, about)
    result = {
        "run": str(dest),
        "checkpoint": str(path),
        **about,
        "sample": f"sample {dest}",
        "fine-tune": f"train {dest / 'config.yaml'} --from {dest} --run runs/{dest.name}-tuned",
    }
    print(json.dumps(result, indent=2))
    return 0


def published(options: argparse.Namespace) -> tuple[Config, dict[str, Tensor]]:
    """The experiment and the weights of a checkpoint in a layout of others.

    Raises:
        ValueError: it does not hold what that layout has.
    """
    # One module a layout, each with the same three functions.
    layout = importlib.import_module(f"diffusion_pl.interop.{options.kind}")
    try:
        settings, weights = layout.read(options.source)
        experiment = experiment_of(
            layout.nodes(settings), options.dest, options.like, options.allow
        )
        return experiment, layout.denoiser_from(settings, weights).state_dict()
    except ValueError:
        raise
    except Exception as error:  # settings of any type and size
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{options.source}: does not hold what a checkpoint of {options.kind} does "
            f"({type(error).__name__}: {reason})"
        ) from error


def experiment_of(
    nodes: dict[str, Any], dest: Path, like: str | None, allow: Sequence[str] = ()
) -> Config:
    """The experiment that an imported model is of: its own network, objective and sampler.

    Args:
        nodes: `network`, `objective`, `sampler`, perhaps others.
        dest: names the run, and the folder of its images when `like` gives no data.
        like: the experiment that gives the rest; base settings otherwise.
        allow: what its file is trusted with, by name.

    Raises:
        ConfigError: an unknown experiment, or one of other images.
    """
    base = config.load(like or "base", allow=allow)
    network = nodes["network"]
    tree = base.tree | nodes
    if like is None:
        tree["data"] = {
            "_target_": "diffusion_pl.data.folder.ImageFolder",
            "path": f"data/{dest.name}",
            "resolution": network["resolution"],
            "labels": bool(network.get("classes")),
            "batch_size": 128,
        }
        tree.setdefault("ema", {"_target_": "diffusion_pl.training.ema.EMA", "half_life": 500_000})
    experiment = dataclasses.replace(base, name=dest.name, tree=tree)
    parts.bind(experiment)
    data = config.build(experiment, "data")
    wanted = network["resolution"], network.get("channels", 3)
    if (data.resolution, data.channels) != wanted:
        raise experiment.error(
            "data",
            f"the model is of {wanted[1]} x {wanted[0]} x {wanted[0]} images (got {data.channels} "
            f"x {data.resolution} x {data.resolution}); name an experiment of such data by --like",
        )
    return experiment


def check(experiment: Config, state: dict[str, Tensor], source: Path) -> None:
    """See that what the run's config builds takes the weights.

    Raises:
        ValueError: names the first key that does not fit.
    """
    objective: TrainingObjective = config.build(experiment, "objective")
    denoiser = objective.denoiser(parts.meta_network(experiment))
    named = {"state_dict": {f"ema.{key}": value for key, value in state.items()}}
    checkpoints.match_weights(denoiser, named, "ema", source)


def write(
    dest: Path, experiment: Config, state: dict[str, Tensor], images: int, about: dict[str, Any]
) -> Path:
    """Write the run's folder, the checkpoint last; returns the checkpoint."""
    header = f"# Imported from {about['from']} ({about['kind']}), sha256 {about['sha256']}\n"
    text = header + config.dump(experiment)
    write_atomically(dest / "config.yaml", lambda file: file.write(text.encode()))
    path = dest / "checkpoints" / f"{images:012d}.ckpt"
    section = {
        "format": checkpoints.FORMAT,
        "config": experiment.tree,
        "images": images,
        "imported": about,
    }
    both = {f"{name}.{key}": value for name in ("denoiser", "ema") for key, value in state.items()}
    checkpoints.save({"state_dict": both, checkpoints.SECTION: section}, path)
    checkpoints.point_to(path)
    return path


def digest(source: Path) -> str:
    """The sha256 of a file, or of the weight files of a folder one after the other."""
    files = [source] if source.is_file() else sorted(source.rglob("diffusion_pytorch_model*"))
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                whole.update(piece)
    return whole.hexdigest()
