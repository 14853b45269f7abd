"""A trained run opened for sampling: its config, its weights, its sampler."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_pl import config
from diffusion_pl.commands import asked, hints, parts, trust
from diffusion_pl.commands.options import ConditionOptions, RunOptions, SamplerOptions
from diffusion_pl.commands.sampling import refuse_duplicates, sampler_of, untrained_levels
from diffusion_pl.config import Config
from diffusion_pl.data.loader import DataConfig, Degradation
from diffusion_pl.diffusion.classifier_free import Weight, is_plain
from diffusion_pl.diffusion.conditions import sizes
from diffusion_pl.diffusion.guidance import Guide, Routed, guide_of
from diffusion_pl.diffusion.objective import TrainingObjective
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation, ImageGenerator
from diffusion_pl.evaluation.prompts import Prompts, TextEncoder
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.evaluation.sources import Source
from diffusion_pl.images import ImageDataset
from diffusion_pl.names import plain, shown
from diffusion_pl.samplers.sampler import Visiting, check_range
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import power_ema
from diffusion_pl.training.settings import AUTOCAST, TrainerConfig, resolve_precision

NOTHING = ConditionOptions()  # is asked for


@dataclass(frozen=True)
class Model:
    """A checkpoint's denoiser, on the CPU, and what it was built from.

    Args:
        checkpoint: the file.
        images: that its weights were trained on.
        config: the run's, with the command's overrides.
        objective: of its training.
        denoiser: D, in evaluation mode.
        dropout: of its conditions in training, whatever the command's overrides say.
        trained: the network as it was trained, without memory for its weights.
        class_names: in order, from the training data; () where it had none.
        encoder: of the captions it was trained with; None for a model without text.
    """

    checkpoint: Path
    images: int
    config: Config
    objective: TrainingObjective
    denoiser: Denoiser
    dropout: Mapping[str, float]
    trained: nn.Module
    class_names: tuple[str, ...] = ()
    encoder: TextEncoder | None = None

    @property
    def taken(self) -> dict[str, int]:
        """How much of each kind of condition it takes, see `conditions.sizes`."""
        return sizes(self.denoiser.network)

    @cached_property
    def degradation(self) -> Degradation | None:
        """What it is given of images, if it takes any."""
        data: DataConfig = config.build(self.config, "data")
        return data.image if self.taken["image"] else None


@dataclass(frozen=True)
class OpenedRun:
    """A run opened for sampling.

    Args:
        folder: the run's folder.
        model: from its newest checkpoint, or the one that was named.
        generator: the denoiser on its device, with its sampler.
    """

    folder: Path
    model: Model
    generator: ImageGenerator

    def about(self, folder: Path | None = None) -> dict[str, Any]:
        """What a result says of its run; with a folder, of the grid that is written there too."""
        written = {} if folder is None else {"folder": folder, "grid": folder / "grid.png"}
        guide, names = self.generator.guide, self.model.class_names
        said = self.generator.asked()
        named = {key: value for key, value in said.items() if value is not None}
        if (label := said.get("label")) is not None and label < len(names):
            named |= {"class_name": names[label]}
        for source in self.generator.sources:
            if isinstance(source, Prompts) and (cut := source.states.cut):
                named |= {"cut": [{"prompt": i + 1, "kept": kept} for i, kept in cut.items()]}
        return {
            **{key: str(path) for key, path in written.items()},
            **named,
            "checkpoint": str(self.model.checkpoint),
            "images_seen": self.model.images,
            "seed": self.generator.seed,
            "sampler": described(self.generator.sampler),
            "guidance": self.generator.guidance,
            "guide": None if guide is None else guide.name,
        }


def open_model(
    run: Path,
    weights: str = "ema",
    allow: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> Model:
    """Open a run's newest checkpoint, or the checkpoint file that is named.

    Args:
        weights: "ema" or "denoiser", averaged or raw; "ema:0.1" for the average of that relative
            length, reconstructed from the run's snapshots.
        allow: packages to trust beside this one.
        overrides: `key=value` over the run's config.

    Raises:
        UserError: there is no run, or it is unfit.
    """
    path = checkpoint_of(run)
    loaded = checkpoints.load(path)
    tree, images = checkpoints.described(loaded, path)
    experiment = _read_config(tree, path, allow, overrides)
    objective: TrainingObjective = config.build(experiment, "objective")
    names, encoder = checkpoints.class_names(loaded), checkpoints.text_encoder(loaded, path)
    kind, _, length = weights.partition(":")
    source = path
    if length:
        source = path.parent.parent / power_ema.FOLDER
        state = power_ema.reconstruct(source, images, float(length))
        loaded = {"state_dict": {f"{kind}.{key}": value for key, value in state.items()}}
    # Checked without memory first: the config of an untrusted file may describe a huge network.
    most = len(loaded["state_dict"])
    meta = objective.denoiser(parts.meta_network(experiment, most))
    state = checkpoints.match_weights(meta, loaded, kind, source)
    denoiser = objective.denoiser(config.build(experiment, "network"))
    denoiser.load_state_dict(state)
    denoiser.to(memory_format=torch.channels_last)
    denoiser.eval().requires_grad_(False)
    own = config.load_resolved(tree, str(path), allow)
    dropout: Mapping[str, float] = config.build(own, "trainer").dropout
    trained = parts.meta_network(own, most) if overrides else meta.network
    return Model(path, images, experiment, objective, denoiser, dropout, trained, names, encoder)


def config_of(run: Path, allow: Sequence[str] = ()) -> Config:
    """The config of a run's newest checkpoint.

    Args:
        allow: packages to trust beside this one.

    Raises:
        UserError: there is no run, or it is unfit.
    """
    path = checkpoint_of(run)
    tree, _ = checkpoints.described(checkpoints.load(path), path)
    return _read_config(tree, path, allow)


def _read_config(
    tree: Mapping[str, Any], path: Path, allow: Sequence[str], overrides: Sequence[str] = ()
) -> Config:
    """A checkpoint's config with overrides, checked."""
    experiment = config.load_resolved(tree, str(path), allow, overrides)
    parts.bind(experiment)
    return experiment


def open_run(
    run: Path,
    sampling: SamplerOptions,
    options: RunOptions,
    wanted: ConditionOptions | None = NOTHING,
    *,
    complete: bool = False,
) -> OpenedRun:
    """Open a run for sampling; what its sampler does otherwise than in training goes to stderr.

    Args:
        sampling: sampler and weights.
        options: of the run.
        wanted: what the images are to be; None: they are given, with conditions of their own.
        complete: refuse to draw what is not wanted explicitly, as for images of the user's.

    Raises:
        UserError: there is no run, it is unfit, or a setting does not fit it.
    """
    model = open_model(run, sampling.weights, options.allow, options.set)
    generator, changed = make_generator(model, sampling, options, wanted, complete=complete)
    unknown = untrained_levels(generator.sampler, model.objective)  # type: ignore[arg-type]
    for text in filter(None, (changed, unknown)):
        print(shown(text), file=sys.stderr)
    return OpenedRun(model.checkpoint.parent.parent, model, generator)


def make_generator(
    model: Model,
    sampling: SamplerOptions,
    options: RunOptions,
    wanted: ConditionOptions | None = NOTHING,
    *,
    complete: bool = False,
) -> tuple[ImageGenerator, str | None]:
    """The generator that the options ask for, and how its sampler differs from the run's, if so.

    Args:
        model: opened; moved to the device.
        sampling: sampler and weights.
        options: of the run.
        wanted, complete: as for `open_run`.

    Raises:
        UserError: a setting does not fit the model.
    """
    refuse_duplicates(sampling, options)
    if complete and wanted is not None:
        asked.require(wanted, model.taken)
    sampler, changed = sampler_of(sampling, model.config, model.objective)
    device = resolve_device(options.device)
    model.denoiser.to(device)
    data = config.build(model.config, "data.dataset")
    _check_images(model, data.channels, data.resolution)
    settings: TrainerConfig = config.build(model.config, "trainer")
    precision = resolve_precision(settings.precision, torch.device(device).type)
    generator = ImageGenerator(
        denoiser=model.denoiser,
        sampler=sampler,
        shape=(data.channels, data.resolution, data.resolution),
        sources=() if wanted is None else _sources(model, wanted),
        dropout=model.dropout,
        seed=options.seed,
        precision=AUTOCAST[precision],
        origin=_origin(model, sampling.weights),
        **_guidance(sampling, options, model, sampler),
    )
    return generator, changed


def _sources(model: Model, options: ConditionOptions) -> tuple[Source, ...]:
    """What the images are asked to be."""
    data = config.build(model.config, "data.dataset")
    return asked.sources(
        options,
        model.taken,
        config.build(model.config, "evaluation"),
        class_names=model.class_names,
        encoder=model.encoder,
        length=getattr(model.denoiser.network, "text_length", 0),
        open_data=lambda: images_of(model.config),
        dropout=model.dropout,
        degradation=model.degradation,
        shape=(data.channels, data.resolution, data.resolution),
    )


def _check_images(model: Model, channels: int, side: int) -> None:
    """Refuse overrides of the data that do not fit the network."""
    network: Any = model.denoiser.network
    if network.channels != channels:
        problem = f"the network has {network.channels} channels (got {channels})"
        raise model.config.error("data.dataset", problem)
    try:
        network.check_resolution(side, side)
    except ValueError as error:
        raise model.config.error("data.dataset.resolution", str(error)) from error


def _origin(model: Model, weights: str) -> dict[str, Any]:
    """What is recorded of a checkpoint's weights with every number."""
    ema: dict[str, Any] = {}
    if weights == "ema":
        ema["ema"] = described(config.build(model.config, "ema"))
    elif weights.startswith("ema:"):
        folder = model.checkpoint.parent.parent / power_ema.FOLDER
        made = power_ema.recipe(folder, model.images, float(weights.partition(":")[2]))
        ema["ema_misfit"] = round(made.misfit, 4)  # of the reconstructed profile
    return {
        "weights": weights,
        **ema,
        "checkpoint": str(model.checkpoint),
        "images_seen": model.images,
    }


def guide(run: Path, weights: str = "ema", allow: Sequence[str] = ()) -> Guide:
    """Open the weaker model of autoguidance, as `evaluation.guide` names it in YAML.

    Args:
        run: the weaker model's folder, or a checkpoint file.
        weights: "ema" or "denoiser", averaged or raw.
        allow: packages to trust beside this one.

    Raises:
        UserError: there is no run, or it is unfit.
    """
    model = open_model(run, weights, allow)
    return Guide(str(model.checkpoint), model.denoiser)


def _guidance(
    sampling: SamplerOptions, options: RunOptions, model: Model, sampler: Visiting
) -> dict[str, Any]:
    """The guidance of the run's evaluation, overridden by the options."""
    settings: Evaluation = config.build(model.config, "evaluation")
    weight = settings.guidance if sampling.guidance is None else sampling.guidance
    named = _named_guide(options) if options.guide else settings.guide
    interval = options.guidance_interval or settings.guidance_interval
    if options.guidance_interval is not None:
        _check_interval(interval, weight, sampler.sigmas())
    if is_plain(weight) and not options.guide:
        return {"guidance": 1.0}
    if isinstance(named, Routed):
        named.check(model.trained, weight)
    chosen = guide_of(named, model.denoiser)
    if chosen is not None:
        check_range(sampler, chosen.denoiser.preconditioning.sigma_range)
    return {"guidance": weight, "guidance_interval": interval, "guide": chosen}


def _named_guide(options: RunOptions) -> Guide | Routed:
    """The guide of `--guide`: routed, routed:RATE or a run."""
    assert options.guide is not None
    word, colon, rate = str(options.guide).partition(":")
    if word != "routed":
        return guide(options.guide, allow=options.allow)
    if not colon:
        return Routed()
    try:
        return Routed(float(rate))
    except ValueError as error:
        raise UserError(f"--guide {options.guide}: RATE must be a number in (0, 1)") from error


def _check_interval(interval: tuple[float, float], weight: Weight, sigmas: Tensor) -> None:
    """Refuse an interval of the command line in which no level is guided."""
    low, high = interval
    if is_plain(weight):
        raise UserError("--guidance-interval does nothing at guidance 1; give --guidance WEIGHT")
    if low < high and not bool(((sigmas[:-1] > low) & (sigmas[:-1] <= high)).any()):
        raise UserError(
            f"--guidance-interval: the sampler visits no level in ({low:g}, {high:g}], only "
            f"{float(sigmas[0]):g} to {float(sigmas[-2]):g}"
        )


def resolve_device(name: str) -> str:
    """The torch device that an option names; "auto" is a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"device {name!r}: cannot be used here ({reason}); try cpu") from error
    return name


def images_of(experiment: Config) -> ImageDataset:
    """The training images of a run.

    Raises:
        UserError: they are missing or unfit.
    """
    source = trust.data_of(experiment).dataset
    try:
        source.prepare()
    except ValueError as error:
        path = missing_data(experiment)
        if path is None:
            raise
        raise UserError(
            f"{path}: the run's data is not in the present folder; go to the folder that has it, "
            "or name its place: --set data.dataset.path=PATH"
        ) from error
    return source.open()


def missing_data(experiment: Config) -> str | None:
    """The relative path of a run's data, where it does not exist in the present folder.

    The run was copied, moved or imported, or the command is typed in another folder.
    """
    folder = parts.data_folder(config.build(experiment, "data.dataset"))
    if folder is None or folder.is_absolute() or folder.exists():
        return None
    return str(folder)


def is_run(path: Path) -> bool:
    """Whether a path looks like a run's folder or a checkpoint, rather than images."""
    return path.suffix == ".ckpt" if path.is_file() else (path / "checkpoints").is_dir()


def checkpoint_of(run: Path) -> Path:
    """The newest checkpoint of a run's folder, or the checkpoint file itself.

    Raises:
        UserError: there is none.
    """
    if run.suffix == ".safetensors" and run.exists():
        raise UserError(
            f"{run}: holds exported weights; import them as a run: "
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
