"""A trained run opened for drawing: its config read with care, its weights, its sampler."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_pl import config
from diffusion_pl.commands import hints, parts, sampling, trust
from diffusion_pl.commands.labels import class_of
from diffusion_pl.commands.options import RunOptions, SamplerOptions
from diffusion_pl.config import Config
from diffusion_pl.diffusion.guidance import Guide
from diffusion_pl.diffusion.objective import TrainingObjective
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation, ImageGenerator
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.images import ImageDataset
from diffusion_pl.names import plain, shown
from diffusion_pl.samplers.sampler import Visiting, check_range
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import power_ema
from diffusion_pl.training.settings import AUTOCAST, TrainerConfig, resolve_precision

# Data that lies in a folder of the user's; other data is made or fetched where it is not there.
FOLDERS = ("diffusion_pl.data.shards.Shards", "diffusion_pl.data.folder.ImageFolder")


@dataclass(frozen=True)
class Model:
    """A checkpoint's denoiser, on the CPU, and what it was built from.

    Args:
        checkpoint: the file.
        images: images that its weights have seen.
        config: the run's, with the command's overrides.
        objective: what trained it.
        denoiser: D, ready to draw.
        label_dropout: share of the labels that were hidden from it in training, whatever the
            command's overrides say.
        class_names: of the classes in order, as the run's data had them; () where they had none.
    """

    checkpoint: Path
    images: int
    config: Config
    objective: TrainingObjective
    denoiser: Denoiser
    label_dropout: float
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpenedRun:
    """A run opened for drawing.

    Args:
        folder: the run's folder.
        model: of its newest checkpoint, or the one that was named.
        generator: the denoiser on its device, with its sampler.
    """

    folder: Path
    model: Model
    generator: ImageGenerator

    def about(self) -> dict[str, Any]:
        """What a result says of where it comes from."""
        guide, label = self.generator.guide, self.generator.label
        names = self.model.class_names
        named: dict[str, Any] = {} if label is None else {"label": label}
        if label is not None and label < len(names):
            named |= {"class_name": names[label]}
        return {
            **named,
            "checkpoint": str(self.model.checkpoint),
            "images_seen": self.model.images,
            "seed": self.generator.seed,
            "sampler": described(self.generator.sampler),
            "guidance": self.generator.guidance,
            "guide": None if guide is None else guide.name,
        }


@dataclass(frozen=True)
class Chosen:
    """How images are drawn, and what of the run's own way the command line changed.

    Args:
        generator: the denoiser with its sampler.
        changed: in words; None for nothing.
    """

    generator: ImageGenerator
    changed: str | None


def open_model(
    run: Path,
    weights: str = "ema",
    allow: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> Model:
    """Open a run's newest checkpoint, or the checkpoint file that is named.

    Args:
        weights: "ema" or "denoiser", averaged or raw; "ema:0.1" is the average of that relative
            length, made from the run's snapshots.
        allow: packages to trust beside this one.
        overrides: `key=value` over the run's config.

    Raises:
        UserError: no run there, or one that is unfit.
    """
    path = checkpoint_of(run)
    loaded = checkpoints.load(path)
    tree, images = checkpoints.described(loaded, path)
    experiment = _bound(tree, path, allow, overrides)
    objective: TrainingObjective = config.build(experiment, "objective")
    names = checkpoints.class_names(loaded)
    kind, _, length = weights.partition(":")
    source = path
    if length:
        source = path.parent.parent / power_ema.FOLDER
        state = power_ema.reconstruct(source, images, float(length))
        loaded = {"state_dict": {f"{kind}.{key}": value for key, value in state.items()}}
    # Before memory is taken for a network that a config of others may have made huge.
    small = objective.denoiser(parts.meta_network(experiment, len(loaded["state_dict"])))
    state = checkpoints.match_weights(small, loaded, kind, source)
    denoiser = objective.denoiser(config.build(experiment, "network"))
    denoiser.load_state_dict(state)
    denoiser.to(memory_format=torch.channels_last)
    denoiser.eval().requires_grad_(False)
    own = config.load_resolved(tree, str(path), allow)
    dropped: float = config.build(own, "trainer").label_dropout
    return Model(path, images, experiment, objective, denoiser, dropped, names)


def config_of(run: Path, allow: Sequence[str] = ()) -> Config:
    """The config of a run's newest checkpoint; its network is not built.

    Args:
        allow: packages to trust beside this one.

    Raises:
        UserError: no run there, or one that is unfit.
    """
    path = checkpoint_of(run)
    tree, _ = checkpoints.described(checkpoints.load(path), path)
    return _bound(tree, path, allow)


def _bound(
    tree: Mapping[str, Any], path: Path, allow: Sequence[str], overrides: Sequence[str] = ()
) -> Config:
    """A checkpoint's config with overrides, all of its sections checked."""
    experiment = config.load_resolved(tree, str(path), allow, overrides)
    parts.bind(experiment)
    return experiment


def open_run(run: Path, how: SamplerOptions, options: RunOptions, **generator: Any) -> OpenedRun:
    """Open a run for drawing.

    Args:
        how: images are sampled.
        options: of the run.
        generator: further arguments of the ImageGenerator.

    Raises:
        UserError: no run there, one that is unfit, or a setting that does not fit it.
    """
    model = open_model(run, how.weights, options.allow, options.set)
    drawn = make_generator(model, how, options, **generator)
    if drawn.changed:
        print(shown(drawn.changed), file=sys.stderr)
    unknown = sampling.untrained_levels(drawn.generator.sampler, model.objective)  # type: ignore[arg-type]
    if unknown:
        print(shown(unknown), file=sys.stderr)
    return OpenedRun(model.checkpoint.parent.parent, model, drawn.generator)


def make_generator(
    model: Model, how: SamplerOptions, options: RunOptions, **generator: Any
) -> Chosen:
    """How the command line wants images drawn from a model.

    Args:
        model: opened; moved to the device.
        how: images are sampled.
        options: of the run.
        generator: further arguments of the ImageGenerator.

    Raises:
        UserError: a setting that does not fit the model.
    """
    sampling.refuse_twice(how, options)
    sampler, changed = sampling.sampler_of(how, model.config, model.objective)
    device = resolve_device(options.device)
    model.denoiser.to(device)
    classes: int = model.denoiser.network.classes  # type: ignore[assignment]
    if "label" in generator:
        generator["label"] = class_of(generator["label"], model.class_names, classes)
    data = config.build(model.config, "data.dataset")
    _check_images(model, data.channels, data.resolution)
    settings: TrainerConfig = config.build(model.config, "trainer")
    precision = resolve_precision(settings.precision, torch.device(device).type)
    chosen = ImageGenerator(
        denoiser=model.denoiser,
        sampler=sampler,
        shape=(data.channels, data.resolution, data.resolution),
        classes=classes,
        label_dropout=model.label_dropout,
        seed=options.seed,
        precision=AUTOCAST[precision],
        origin=_origin(model, how.weights),
        **_guidance(how, options, model.config, sampler),
        **generator,
    )
    return Chosen(chosen, changed)


def _check_images(model: Model, channels: int, side: int) -> None:
    """See that the network is of the images that the config says; an override may say others.

    Raises:
        ConfigError: it is not.
    """
    network: Any = model.denoiser.network
    if network.channels != channels:
        problem = f"the network is of {network.channels} channels (got {channels})"
        raise model.config.error("data.dataset", problem)
    try:
        network.check_resolution(side, side)
    except ValueError as error:
        raise model.config.error("data.dataset.resolution", str(error)) from error


def _origin(model: Model, weights: str) -> dict[str, Any]:
    """What numbers say of a checkpoint's weights."""
    ema: dict[str, Any] = {}
    if weights == "ema":
        ema["ema"] = described(config.build(model.config, "ema"))
    elif weights.startswith("ema:"):
        folder = model.checkpoint.parent.parent / power_ema.FOLDER
        made = power_ema.recipe(folder, model.images, float(weights.partition(":")[2]))
        ema["ema_misfit"] = round(made.misfit, 4)  # how far its profile is from the one asked for
    return {
        "weights": weights,
        **ema,
        "checkpoint": str(model.checkpoint),
        "images_seen": model.images,
    }


def guide(run: Path, weights: str = "ema", allow: Sequence[str] = ()) -> Guide:
    """Open the weaker model of autoguidance; what `evaluation.guide` names in YAML.

    Args:
        weights: "ema" or "denoiser", averaged or raw.
        allow: packages to trust beside this one.

    Raises:
        UserError: no run there, or one that is unfit.
    """
    model = open_model(run, weights, allow)
    return Guide(str(model.checkpoint), model.denoiser)


def _guidance(
    how: SamplerOptions, options: RunOptions, experiment: Config, sampler: Visiting
) -> dict[str, Any]:
    """The guidance of the run's evaluation, and over it what the command line says."""
    settings: Evaluation = config.build(experiment, "evaluation")
    weight = settings.guidance if how.guidance is None else how.guidance
    chosen = guide(options.guide, allow=options.allow) if options.guide else settings.guide
    interval = options.guidance_interval or settings.guidance_interval
    if options.guidance_interval is not None:
        _check_interval(interval, weight, sampler.sigmas())
    if weight == 1 and not options.guide:
        return {"guidance": 1.0}
    if chosen is not None:
        check_range(sampler, chosen.denoiser.preconditioning.sigma_range)
    return {
        "guidance": weight,
        "guidance_interval": interval,
        "guide": chosen,
    }


def _check_interval(interval: tuple[float, float], weight: float, sigmas: Tensor) -> None:
    """Refuse an interval on the command line in which nothing is guided."""
    low, high = interval
    if weight == 1:
        raise UserError("--guidance-interval does nothing at guidance 1; give --guidance WEIGHT")
    if low < high and not bool(((sigmas[:-1] > low) & (sigmas[:-1] <= high)).any()):
        raise UserError(
            f"--guidance-interval: the sampler visits no level in ({low:g}, {high:g}], only "
            f"{float(sigmas[0]):g} to {float(sigmas[-2]):g}"
        )


def resolve_device(name: str) -> str:
    """The device of a word on the command line; "auto" is a GPU where there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def images_of(experiment: Config) -> ImageDataset:
    """The images that a run was trained on.

    Raises:
        UserError: they are not there, or unfit.
    """
    source = trust.data_of(experiment).dataset
    try:
        source.prepare()
    except ValueError as error:
        path = missing_data(experiment)
        if path is None:
            raise
        raise UserError(
            f"{path}: not prepared in the present folder, where the run's data is looked for; go "
            "where it lies, or say where: --set data.dataset.path=PATH"
        ) from error
    return source.open()


def missing_data(experiment: Config) -> str | None:
    """The path of a run's data, where it is none from the present folder; None where it is.

    So it is of a run that was copied, moved or imported, or of a command typed elsewhere.
    """
    node = experiment.get("data.dataset")
    path = node.get("path")
    if node.get("_target_") not in FOLDERS or type(path) is not str:
        return None
    if os.path.isabs(path) or "://" in path or node.get("made_of"):
        return None
    return None if Path(path).exists() else path


def is_run(path: Path) -> bool:
    """Whether a path looks like a run's folder or a checkpoint, rather than images."""
    return path.suffix == ".ckpt" if path.is_file() else (path / "checkpoints").is_dir()


def checkpoint_of(run: Path) -> Path:
    """The checkpoint that a run's folder or a file names.

    Raises:
        UserError: there is none.
    """
    if run.suffix == ".safetensors" and run.exists():
        raise UserError(
            f"{run}: holds weights for others; make a run of it: "
            f"{hints.command('import', 'safetensors', run, parts.RUNS / plain(run.stem))}"
        )
    if run.is_file():
        return run
    if not run.is_dir():
        raise UserError(f"{run}: there is no such run; runs lie under {parts.RUNS}/")
    latest = checkpoints.latest(run / "checkpoints")
    if latest is None:
        raise UserError(f"{run}: has no checkpoint yet; train it first")
    return latest
