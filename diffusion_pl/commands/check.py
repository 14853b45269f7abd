"""`check`: check an experiment and describe it, in seconds, without data or a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_pl import config
from diffusion_pl.addresses import masked
from diffusion_pl.commands import parts, sampling
from diffusion_pl.commands.options import Allow
from diffusion_pl.commands.results import Result, line
from diffusion_pl.config import Config
from diffusion_pl.data import shard_texts
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.shard_format import Manifest
from diffusion_pl.data.shards import Shards
from diffusion_pl.diffusion.extra import WithExtra
from diffusion_pl.diffusion.objective import TrainingObjective
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import nearest
from diffusion_pl.samplers.pyramid import PyramidSampler
from diffusion_pl.text import minilm
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.lr_schedule import is_torch_s
from diffusion_pl.training.settings import (
    OURS,
    TrainerConfig,
    check_augment,
    resolve_precision,
)


def command(experiment: str, /, *words: str, resolved: bool = False, allow: Allow = ()) -> Result:
    """Check an experiment's YAML and describe its network, batch, noise levels and budget.

    With several experiments all are checked, whatever is wrong with those before.

    Example: diffusion_pl check cifar10_edm data.batch_size=256

    Args:
        experiment: a name, or a YAML file anywhere.
        words: further experiments, and KEY=VALUE over all of them, such as optimizer.lr=1e-4.
        resolved: print the resolved YAML, with all defaults; `train` accepts it.
    """
    names = [word for word in (experiment, *words) if "=" not in word]
    overrides = [word for word in (experiment, *words) if "=" in word]
    lines: list[str] = []
    values: dict[str, Any] = {}
    wrong = []
    for name in names:
        try:
            if resolved:
                read = parts.read(name, overrides, allow=allow)
                values[name] = read.tree
                lines += [*["---"] * (len(values) > 1), *config.dump(read).splitlines()]
                continue
            lines += [f"{name}:"] * (len(names) > 1)
            values[name] = {}
            for title, text in describe(name, overrides, allow):
                values[name][title] = text
                lines.append(line(title, text))
        except ValueError as error:
            wrong.append(str(error))
    problems = "\n".join(dict.fromkeys(wrong))
    if wrong and not lines:
        raise UserError(problems)
    after = masked(f"error: {problems}").splitlines() if wrong else []
    return Result(values, lines, after, code=2 if wrong else 0, in_pipes=True)


def describe(
    name: str, overrides: Sequence[str], allow: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """What an experiment will do, as (title, text).

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    experiment = parts.read(name, overrides, allow=allow)
    objective: TrainingObjective = config.build(experiment, "objective")
    network = parts.meta_network(experiment)
    for title, text in [
        ("network", _network(experiment, network)),
        ("data", _data(experiment)),
        ("batch", _batch(experiment)),
        ("strategy", _strategy(experiment, objective)),
        ("sizes", _sizes(experiment, network)),
        ("budget", _budget(experiment)),
        ("noise", _noise(experiment, objective)),
        ("extra", _extra(objective)),
        ("pyramid", _pyramid(experiment, objective, network)),
        ("warning", _large_patches(objective, network)),
        ("warning", _texts(experiment, network)),
    ]:
        if text:
            yield title, text


def _network(experiment: Config, network: nn.Module) -> str:
    data = config.build(experiment, "data.dataset")
    count = sum(parameter.numel() for parameter in network.parameters())
    try:
        network.check_resolution(data.resolution, data.resolution)  # type: ignore[operator]
    except ValueError as error:
        raise experiment.error("network", str(error)) from error
    try:
        check_augment(config.build(experiment, "augment"), network)
    except ValueError as error:
        raise experiment.error("augment", str(error).removeprefix("augment: ")) from error
    size = f"{data.channels} x {data.resolution} x {data.resolution}"
    return f"{type(network).__name__}, {count:,} parameters, for images of {size}"


def _data(experiment: Config) -> str:
    """The data at its path; "" where it is known only when a run starts."""
    data: DataConfig = config.build(experiment, "data")
    source = data.dataset
    if isinstance(source, Shards) and parts.is_made_later(source):
        return f"{source.path} is made at the first start"
    path = parts.data_folder(source)
    if path is None:
        return ""
    if not path.exists():
        near = nearest(path)
        return f"{path} is not there{'' if near is None else f'; {near} is'}"
    if not isinstance(source, Shards):
        return f"{path} is there"
    if source.text is not None:  # told with the file that asks for it
        dataclasses.replace(source, text=None).prepare()
        try:
            source.prepare()
        except ValueError as error:
            raise experiment.error("data.dataset.text", str(error)) from error
    try:
        source.prepare()  # what is made already is only looked at
        manifest = Manifest.read(path)
        for resolution in data.resolution_weights or ():
            source.check_resolution(manifest, resolution)
        if manifest.count < data.batch_size:
            raise UserError(
                f"{path}: {manifest.count:,} images are less than a batch of {data.batch_size:,}"
            )
        classes = experiment.get("network").get("classes", 0)
        if classes not in (0, manifest.classes):
            raise UserError(
                f"{path}: has {manifest.classes} classes, network.classes is {classes}; "
                f"set network.classes={manifest.classes}"
            )
    except ValueError as error:
        raise experiment.error("data.dataset", str(error)) from error
    of = f", {manifest.classes:,} classes" if manifest.classes else ""
    return f"{path}: {manifest.count:,} images at {manifest.resolutions} px{of}"


def _batch(experiment: Config) -> str:
    settings: TrainerConfig = config.build(experiment, "trainer")
    batch_size, devices = experiment.get("data.batch_size"), settings.devices_per_node()
    size = parts.device_batch(experiment, settings, settings.world_size())
    precision = resolve_precision(settings.precision, settings.device_type())
    return (
        f"{batch_size:,} images = {settings.nodes} nodes x {devices} devices x {size} images, "
        f"each in {settings.micro_batches(size)} micro-batches; "
        f"{precision} on {settings.device_type()} here"
    )


def _strategy(experiment: Config, objective: TrainingObjective) -> str:
    """How the model is distributed over devices; "" for one device."""
    settings: TrainerConfig = config.build(experiment, "trainer")
    devices = settings.world_size()
    try:
        settings.check_objective(objective)
    except ValueError as error:
        raise experiment.error("trainer", str(error)) from error
    if settings.strategy not in OURS:
        given = settings.strategy
        name = given if isinstance(given, str) else type(given).__name__
        return f"{name}, Lightning's own: docs/scaling.md says what is not guaranteed with it"
    if settings.strategy == "ddp":
        return "" if devices == 1 else f"ddp: each of {devices} devices holds the whole model"
    if devices == 1:
        return "fsdp: one device here, which holds the whole model"
    return f"fsdp: each of {devices} devices holds 1/{devices} of weights, moments and averages"


def _sizes(experiment: Config, network: nn.Module) -> str:
    """The resolutions of the steps, their frequencies and micro-batches."""
    data: DataConfig = config.build(experiment, "data")
    weights, whole = data.resolution_weights, data.dataset.resolution
    if not weights:
        return ""
    settings: TrainerConfig = config.build(experiment, "trainer")
    devices = settings.world_size()
    size, total = parts.device_batch(experiment, settings, devices), sum(weights.values())
    words = []
    for resolution, weight in weights.items():
        crop = data.crop is not None and data.crop.size < resolution
        side = data.crop.size if data.crop is not None and crop else resolution
        try:
            network.check_resolution(side, side)  # type: ignore[operator]
        except ValueError as error:
            raise experiment.error("data.resolution_weights", str(error)) from error
        count = settings.micro_batches(size, (side / whole) ** 2)
        cut = f", crops of {side}" if crop else ""
        words.append(
            f"{resolution} px in {weight / total:.0%} of the steps ({count} micro-batches{cut})"
        )
    return ", ".join(words)


def _budget(experiment: Config) -> str:
    settings: TrainerConfig = config.build(experiment, "trainer")
    ema: EMA = config.build(experiment, "ema")
    batch_size = experiment.get("data.batch_size")
    return (
        f"{settings.total_images:,} images = {settings.steps(batch_size):,} steps; "
        f"{_rate(experiment, settings)}, EMA half-life {ema.half_life:,.0f} images"
    )


def _rate(experiment: Config, settings: TrainerConfig) -> str:
    """The learning-rate schedule."""
    schedule, batch_size = parts.lr_schedule_of(experiment), experiment.get("data.batch_size")
    if schedule is None:
        return "constant learning rate"
    if is_torch_s(schedule):
        return f"learning rate by {schedule.func.__name__}, in steps"  # type: ignore[attr-defined]
    total = settings.rounded_images(batch_size)
    seen = (0, total // 4, total // 2, total * 3 // 4, total - batch_size)
    factors = ", ".join(f"{schedule(images, total):.3g}" for images in seen)
    return f"learning rate times {factors} at each quarter"


def _noise(experiment: Config, objective: TrainingObjective) -> str:
    sampler = parts.sampler_of(experiment, objective)
    quantiles = torch.tensor([0.001, 0.5, 0.999], dtype=torch.float64)
    low, middle, high = objective.schedule(quantiles).tolist()
    visited = sampler.sigmas()
    unknown = sampling.untrained_levels(sampler, objective)
    return (
        f"training sigma {low:.4g} to {high:.4g} (99.8 %), median {middle:.4g}; sampling "
        f"{float(visited[0]):.4g} to {float(visited[-2]):.4g} in {sampler.steps} steps"
        f"{'' if unknown is None else f'; {unknown}'}"
    )


def _extra(objective: TrainingObjective) -> str:
    """The losses beside the objective's own; "" for none."""
    if not isinstance(objective, WithExtra):
        return ""
    said = [f"{type(each).__name__} x {each.weight:g}" for each in objective.losses]
    missing = parts.missing_weights(objective)
    return ", ".join(said) + ("" if missing is None else f"; {missing}")


def _pyramid(experiment: Config, objective: TrainingObjective, network: nn.Module) -> str:
    """The sizes of a pyramid's sampling; "" for another sampler."""
    sampler = parts.sampler_of(experiment, objective)
    if not isinstance(sampler, PyramidSampler):
        return ""
    side = config.build(experiment, "data.dataset").resolution
    sizes = sampler.sizes(side, side)
    try:
        for size in sizes:
            network.check_resolution(*size)  # type: ignore[operator]
    except ValueError as error:
        raise experiment.error("sampler.levels", str(error)) from error
    starts = [
        f"{size[0]} from {float(stage[0]):.4g} in {len(stage) - 1}"
        for size, stage in zip(sizes, sampler.stages(), strict=True)
    ]
    return f"{', '.join(starts)} steps: the work of {sampler.cost():.1f} at {side}"


# JiT's Table 2: with patches of 4 every prediction trains, with patches of 16 the image's alone.
LARGE_PATCH = 8


def _large_patches(objective: TrainingObjective, network: nn.Module) -> str:
    """What is known of a prediction other than the image's over large patches; "" for others."""
    patch = getattr(network, "patch_size", 1)
    c = objective.preconditioning(torch.tensor([1.0], dtype=torch.float64))
    if patch < LARGE_PATCH or not c.c_skip.any():
        return ""
    return (
        f"over patches of {patch} pixels JiT (arXiv:2511.13720, Tables 2 and 10) found every "
        "prediction but the image's to fail: FID 72 to 395 for the noise, 36 to 127 for the "
        "velocity, 29 to 72 with EDM's preconditioning, where the image's had 8.6; train with "
        "diffusion_pl.objectives.jit.JiT or predict: image"
    )


def _texts(experiment: Config, network: nn.Module) -> str:
    """That captions are read which the network does not take; "" otherwise.

    Raises:
        ConfigError: a network with text, and data of which no captions are read.
    """
    source = config.build(experiment, "data.dataset")
    read = getattr(source, "text", None) or getattr(source, "captions", None)
    width = getattr(network, "text_width", 0)
    if width and not read:
        ways = {"text": "text=auto", "captions": "captions=minilm"}
        setting = next((value for name, value in ways.items() if hasattr(source, name)), None)
        way = f"set data.dataset.{setting}" if setting else "prepare it with --encode ENCODER"
        raise experiment.error(
            "network.text_width",
            f"is {width}, and data.dataset reads no captions; {way}, or network.text_width=0 and "
            "network.text_length=0",
        )
    if not read or width:
        return ""
    return (
        f"data.dataset reads captions ({read}), and the network takes no text (text_width: 0): it "
        f"is trained without them; to train with them set {_text_settings(source)}"
    )


def _text_settings(source: Any) -> str:
    """What a network is to be set to for the captions of a data set, as far as it is known."""
    width: object = "that of the encoder"
    length: object = getattr(source, "caption_length", "that of the captions")
    if isinstance(source, Shards) and parts.data_folder(source) is not None:
        found = shard_texts.chosen(
            source.path, Manifest.read(Path(source.path)), str(source.text), None
        )
        width, length = found.width, found.length
    elif getattr(source, "captions", None) == "minilm":
        width = minilm.WIDTH
    return f"network.text_width={width} network.text_length={length} and trainer.dropout.text=0.1"
