"""`import`: make a run of a published checkpoint, to sample, evaluate and fine-tune."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from diffusion_pl import config
from diffusion_pl.commands import hints, parts
from diffusion_pl.commands.options import Allow, Repeated
from diffusion_pl.commands.results import Result, line
from diffusion_pl.config import Config, ConfigError
from diffusion_pl.diffusion.objective import TrainingObjective
from diffusion_pl.errors import UserError
from diffusion_pl.interop import weights as ours
from diffusion_pl.io.files import regular, write_atomically
from diffusion_pl.names import refuse_class_names, refuse_name, shown
from diffusion_pl.networks.counting import spare
from diffusion_pl.training import checkpoint as checkpoints


def command(
    kind: Literal[
        "edm", "diffusers", "guided", "jit", "lucidrains", "pesser", "prx", "safetensors"
    ],
    source: Path,
    dest: Path,
    /,
    *,
    like: str | None = None,
    set: Repeated = (),
    weights: Literal["ema", "raw"] = "ema",
    null_text: str | None = None,
    allow: Allow = (),
) -> Result:
    """Make a run of a published checkpoint, to sample, evaluate and fine-tune.

    Example: diffusion_pl import edm edm-cifar10-32x32-cond-vp.pkl runs/edm --like cifar10_edm

    Args:
        kind: its layout.
        source: the file, or diffusers' folder.
        dest: the run's folder to make.
        like: experiment for data, optimizer, evaluation and trainer.
        set: KEY=VALUE: what the file does not say, by its own keys, or over the run's config.
        weights: averaged or raw, where the file has both.
        null_text: prx: safetensors with text (L, E) and text_mask (L,), the encoding of an empty
            text, or the encoder that makes it, such as hf:FOLDER.
    """
    if null_text is not None:
        if kind != "prx":
            raise UserError("--null-text is for prx alone; leave it out")
        set = (*set, f"null_text={json.dumps(null_text)}")
    if dest.exists() and any(dest.iterdir()):
        raise UserError(f"{dest}: is not empty; name another folder")
    refuse_name(dest.resolve().name, shown(str(dest)), "name another folder")
    images, about = 0, {"kind": kind, "from": str(source)}
    names: tuple[str, ...] = ()
    encoder: dict[str, Any] | None = None
    notes: list[str] = []
    weighed = source
    if kind == "safetensors":
        known, state = ours.read(source)
        images = known["images"]
        names = checkpoints.class_names(known)
        refuse_class_names(names, str(source), written=True)
        experiment = config.load_resolved(known["config"], str(source), allow, set)
    else:
        experiment, state, notes, weighed, encoder = published(
            kind, source, weights, set, name=dest.name, like=like, allow=allow
        )
    parts.bind(experiment)
    check(experiment, state, source)
    about["sha256"] = digest(weighed)
    path = write(dest, experiment, state, images, about, names, encoder)
    starting = ["--from", str(dest), "--run", f"runs/{dest.name}-tuned"]
    result = {
        "run": str(dest),
        "checkpoint": str(path),
        **about,
        "notes": notes,
        "sample": hints.command("sample", dest),
        "fine-tune": hints.command("train", f"{dest}/config.yaml", *starting),
    }
    lines = [line("run", dest), *(line("note", text) for text in notes)]
    if names:
        lines.append(line("classes", hints.classes(names)))
    return Result(result, lines, [hints.next_line("sample", dest)], indent=2)


def published(
    kind: str, source: Path, weights: str, settings: Sequence[str], **further: Any
) -> tuple[Config, dict[str, Tensor], list[str], Path, dict[str, Any] | None]:
    """The experiment, the weights, the notes and the weights' file of a published checkpoint.

    Beside them what is known of its text encoder; None for a model without text.

    Args:
        kind: the layout.
        source: the file or folder.
        weights: ema or raw, where the file has both.
        settings: `key=value`, as typed after `--set`.
        further: as for `experiment_of`.

    Raises:
        UserError: the file does not have that layout, or does not say what is needed.
    """
    # A module for each layout, with the same functions.
    layout = importlib.import_module(f"diffusion_pl.interop.{kind}")
    own, said = divided(settings)
    replaced = any(key in ("objective", "objective._target_") for key, _ in own)
    try:
        about, given = layout.read(source, said, weights)
        if (missing := layout.asked(about)) and not replaced:
            raise UserError(f"{source}: {missing}")
        nodes = layout.nodes(about)
        if replaced and not any(key.startswith("sampler") for key, _ in own):
            del nodes["sampler"]
        experiment = experiment_of(nodes, source, [text for _, text in own], **further)
        state = layout.weights(about, given)
        named = {f"network.{key}": value for key, value in state.items()}
        weighed = Path(about.get("_from", {}).get("weights", source))
        return experiment, named, layout.notes(about), weighed, about.get("_text_encoder")
    except ValueError as error:
        if isinstance(error, ConfigError) or str(error).startswith(str(source)):
            raise
        raise UserError(f"{source}: {error}") from error
    except Exception as error:  # the file's settings may have any type
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source}: is not a checkpoint of {kind} ({type(error).__name__}: {reason})"
        ) from error


def divided(settings: Sequence[str]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """The overrides in `--set` of our experiment, with their text, and of the file's own keys."""
    own: list[tuple[str, str]] = []
    said: dict[str, Any] = {}
    for text in settings:
        key, value = config.parse_assignment(text)
        first, _, rest = key.partition(".")
        if first in parts.SECTIONS:
            own.append((key, text))
        else:
            said[rest if first in ("unet", "scheduler") and rest else key] = value
    return own, said


def experiment_of(
    nodes: dict[str, Any],
    source: Path,
    overrides: Sequence[str],
    *,
    name: str,
    like: str | None,
    allow: Sequence[str],
) -> Config:
    """The experiment of an imported model: its network, objective and sampler.

    Args:
        nodes: `network`, `objective`, `sampler`, perhaps others; without a sampler, Heun's method
            over the network's range. `dropout` of conditions, or `label_dropout`, where the model
            was trained with it.
        source: the file, for messages.
        overrides: `key=value` over it.
        name: of the run, and without `like` of the folder of its images.
        like: the experiment for all other sections.
        allow: packages to trust beside this one.

    Raises:
        ConfigError: an unknown experiment, or one of other images.
    """
    base = config.load(like or "base", allow=allow)
    network = nodes["network"]
    dropout = nodes.get("dropout", {"label": nodes.get("label_dropout", 0.0)})
    apart = ("label_dropout", "dropout")
    tree = base.tree | {key: node for key, node in nodes.items() if key not in apart}
    tree["trainer"] = {**tree["trainer"], "dropout": dropout}
    if like is None:
        tree["data"] = {
            **tree["data"],
            "dataset": {
                "_target_": "diffusion_pl.data.folder.ImageFolder",
                "path": f"data/{name}",
                "resolution": network["resolution"],
                "labels": bool(network.get("classes")),
                "channels": network.get("channels", 3),
            },
        }
        tree.setdefault("ema", {"_target_": "diffusion_pl.training.ema.EMA", "half_life": 500_000})
    experiment = config.load_resolved(tree, str(source), allow, overrides)
    experiment = dataclasses.replace(experiment, name=name)
    parts.bind(experiment)
    if "sampler" not in nodes:
        low, high = config.build(experiment, "objective").preconditioning.sigma_range
        limits = {"sigma_min": max(0.002, low), "sigma_max": min(80.0, high)}
        experiment.tree["sampler"]["schedule"].update(limits)
    data = config.build(experiment, "data.dataset")
    wanted = network["resolution"], network.get("channels", 3)
    if (data.resolution, data.channels) != wanted:
        raise experiment.error(
            "data",
            f"the model has {wanted[1]} x {wanted[0]} x {wanted[0]} images (got {data.channels} "
            f"x {data.resolution} x {data.resolution}); name one with such data by --like",
        )
    return experiment


def check(experiment: Config, state: dict[str, Tensor], source: Path) -> None:
    """Check that the weights fit what the run's config builds.

    Raises:
        UserError: names the first key that does not fit.
    """
    objective: TrainingObjective = config.build(experiment, "objective")
    denoiser = objective.denoiser(parts.meta_network(experiment, spare(len(state))))
    named = {"state_dict": {f"ema.{key}": value for key, value in state.items()}}
    checkpoints.match_weights(denoiser, named, "ema", source)


def write(
    dest: Path,
    experiment: Config,
    state: dict[str, Tensor],
    images: int,
    about: dict[str, Any],
    names: Sequence[str] = (),
    encoder: dict[str, Any] | None = None,
) -> Path:
    """Write the run's folder; returns its checkpoint."""
    header = f"# Imported from {about['from']} ({about['kind']}), sha256 {about['sha256']}\n"
    text = header + config.dump(experiment)
    write_atomically(dest / "config.yaml", lambda file: file.write(text.encode()))
    path = dest / "checkpoints" / checkpoints.name_of(images)
    section = {
        "format": checkpoints.FORMAT,
        "config": experiment.tree,
        "images": images,
        "imported": about,
    }
    both = {f"{name}.{key}": value for name in ("denoiser", "ema") for key, value in state.items()}
    whole: dict[str, Any] = {"state_dict": both, checkpoints.SECTION: section}
    if names:
        whole[checkpoints.CLASS_NAMES] = list(names)
    if encoder is not None:
        whole[checkpoints.TEXT_ENCODER] = encoder
    checkpoints.save(whole, path)
    checkpoints.point_to(path)
    return path


def digest(source: Path) -> str:
    """The sha256 of a file, or of the concatenated weight files of a folder."""
    files = [source] if source.is_file() else sorted(source.rglob("diffusion_pytorch_model*"))
    whole = hashlib.sha256()
    for file in files:
        with regular(file).open("rb") as opened:
            while piece := opened.read(1 << 20):
                whole.update(piece)
    return whole.hexdigest()
