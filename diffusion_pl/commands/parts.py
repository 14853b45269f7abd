"""The sections of an experiment, checked and built; imports no lightning, so `check` is fast."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_pl import config
from diffusion_pl.commands import trust
from diffusion_pl.config import Config
from diffusion_pl.config.annotations import signature
from diffusion_pl.config.registry import MADE
from diffusion_pl.config.targets import locate
from diffusion_pl.data.dataset import DatasetSpec
from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.shard_format import MANIFEST
from diffusion_pl.data.shards import Shards
from diffusion_pl.diffusion.classifier_free import check_guidance, is_plain
from diffusion_pl.diffusion.conditions import KINDS, sizes
from diffusion_pl.diffusion.guidance import Routed
from diffusion_pl.diffusion.objective import TrainingObjective, needing_network
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation
from diffusion_pl.evaluation.prompts import located, read_prompts
from diffusion_pl.io.cache import is_remote
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.networks.counting import at_most
from diffusion_pl.samplers.pyramid import PyramidSampler
from diffusion_pl.samplers.sampler import Sampler, check_range
from diffusion_pl.training import lr_schedule
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.lr_schedule import LRSchedule
from diffusion_pl.training.opening import check_images
from diffusion_pl.training.optimizers import Grouped
from diffusion_pl.training.settings import OURS, TrainerConfig
from diffusion_pl.training.trying import tried
from diffusion_pl.training.uncompiled import without_compiler

RUNS = Path("runs")
ROUTED = f"{Routed.__module__}.{Routed.__name__}"
PYRAMID = f"{PyramidSampler.__module__}.{PyramidSampler.__name__}"
REFERENCES = Path("data/references")

SECTIONS: dict[str, Any] = {
    "seed": int,
    "data": DataConfig,
    "augment": Callable[..., Any] | None,
    "network": nn.Module,
    "objective": TrainingObjective,
    "optimizer": Callable[..., Any],
    "lr_schedule": Callable[..., Any] | None,
    "ema": EMA,
    "sampler": Sampler | PyramidSampler,
    "features": Extractor,
    "evaluation": Evaluation,
    "trainer": TrainerConfig,
    "callbacks": list[Any] | None,
    "loggers": list[Any] | None,
}
OPTIONAL = ("augment", "lr_schedule", "callbacks", "loggers")
REQUIRED = tuple(name for name in SECTIONS if name not in OPTIONAL)


def read(
    name: str,
    overrides: Sequence[str] = (),
    *,
    allow: Sequence[str] = (),
    beside: Path | None = None,
) -> Config:
    """Read an experiment and check all of it.

    Args:
        name: of an experiment, or of a YAML file.
        overrides: `key=value` over it.
        allow: packages, addresses or files to trust in a file that others may have written.
        beside: the run or checkpoint that training starts from.

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    return checked(config.load(name, overrides, allow=allow, beside=beside))


def checked(experiment: Config) -> Config:
    """Check that all parts of an experiment fit together, and return it.

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    bind(experiment)
    settings: TrainerConfig = config.build(experiment, "trainer")
    _check_trainer(experiment, settings)
    _check_optimizer(experiment, settings)
    _check_objective(experiment, settings)
    _check_guided(experiment, settings)
    _check_prompts(experiment)
    _check_images(experiment)
    _check_dropout(experiment, settings)
    return experiment


def _check_trainer(experiment: Config, settings: TrainerConfig) -> None:
    """Check that blocks can be compiled, and a strategy and a profiler of Lightning's."""
    if settings.compile == "blocks":
        from diffusion_pl.training import compiling

        try:
            compiling.blocks(meta_network(experiment))
        except UserError as error:
            problem = str(error).removeprefix("trainer.compile: ")
            raise experiment.error("trainer.compile", problem) from error
    if settings.strategy in OURS and settings.profiler is None:
        return  # Lightning takes seconds to import
    from diffusion_pl.training import adapter, strategy

    for key, build in {
        "trainer.strategy": lambda: strategy.make_strategy(settings),
        "trainer.profiler": lambda: adapter.profiler(settings, RUNS),
    }.items():
        try:
            build()
        except UserError as error:
            raise experiment.error(key, str(error).removeprefix(f"{key}: ")) from error


def lr_schedule_of(experiment: Config) -> LRSchedule | None:
    """The experiment's schedule of the learning rate; None for a constant one."""
    there = experiment.tree.get("lr_schedule") is not None
    return config.build(experiment, "lr_schedule") if there else None


def _check_optimizer(experiment: Config, settings: TrainerConfig) -> None:
    """Check that the optimizer and the learning-rate schedule can be built."""
    maker = config.build(experiment, "optimizer")
    try:
        grouped = isinstance(maker, Grouped)
        optimizer = tried(maker, _dimensions(experiment) if grouped else {"weight": 1})
    except UserError as error:
        raise experiment.error("optimizer", str(error)) from error
    if (schedule := lr_schedule_of(experiment)) is not None:
        batch_size = experiment.get("data.batch_size")
        try:
            lr_schedule.check(schedule, optimizer, settings.steps(batch_size), batch_size)
        except UserError as error:
            raise experiment.error("lr_schedule", str(error)) from error


def _dimensions(experiment: Config) -> dict[str, int]:
    """The number of dimensions of every trained parameter, by its name in the module."""
    network = meta_network(experiment)
    objective = attached_objective(experiment, network)
    whole = nn.Module()
    if isinstance(objective, nn.Module):
        whole.objective = objective
    whole.denoiser = objective.denoiser(network)
    return {name: each.ndim for name, each in whole.named_parameters() if each.requires_grad}


def attached_objective(experiment: Config, network: nn.Module) -> TrainingObjective:
    """The objective with the weights that it has for a network, on torch's meta device.

    No weights of frozen networks are read.

    Args:
        experiment: bound.
        network: on torch's meta device.

    Raises:
        ConfigError: the network or its images do not fit the objective.
    """
    objective: TrainingObjective = config.build(experiment, "objective")
    parts = needing_network(objective)
    key = "objective.extra" if "extra" in experiment.get("objective") else "objective"
    side = config.build(experiment, "data.dataset").resolution if parts else 0
    for part in parts:
        try:
            with torch.device("meta"):
                part.attach(network, side)
        except UserError as error:
            raise experiment.error(key, str(error)) from error
    return objective


def _check_objective(experiment: Config, settings: TrainerConfig) -> None:
    """Check that the objective fits the network and the strategy."""
    objective: TrainingObjective = config.build(experiment, "objective")
    if needing_network(objective):
        objective = attached_objective(experiment, meta_network(experiment))
    try:
        settings.check_objective(objective)
    except UserError as error:
        raise experiment.error("trainer", str(error)) from error


def missing_weights(objective: TrainingObjective) -> str | None:
    """Which weights of frozen networks are not there, and where to get them; None: all are."""
    for part in needing_network(objective):
        try:
            part.check_weights()
        except UserError as error:
            return str(error)
    return None


def _check_dropout(experiment: Config, settings: TrainerConfig) -> None:
    """Check that the network takes the conditions that are hidden from it in training."""
    arguments = experiment.tree["network"]
    hidden = [kind for kind, share in settings.dropout.items() if share]
    if all(arguments.get(KINDS[kind].size) for kind in hidden):
        return  # without building the network
    taken = sizes(meta_network(experiment))
    for kind in hidden:
        if not taken[kind]:
            raise experiment.error(
                f"trainer.dropout.{kind}",
                f"the network takes no {kind} (network.{KINDS[kind].size} is 0), so there is "
                f"nothing to hide; set trainer.dropout.{kind}=0",
            )


def _check_guided(experiment: Config, settings: TrainerConfig) -> None:
    """Check that the trained model can be evaluated with the guidance that is asked for."""
    evaluation = experiment.tree["evaluation"]  # building it would open the guide
    weight, guide = evaluation.get("guidance", 1.0), evaluation.get("guide")
    if isinstance(guide, Mapping) and guide.get("_target_") == ROUTED:
        routed: Routed = config.build(experiment, "evaluation.guide")
        try:
            routed.check(meta_network(experiment), weight)
        except UserError as error:
            raise experiment.error("evaluation.guide", str(error)) from error
    if is_plain(weight) or guide is not None:
        return
    try:
        check_guidance(weight, taken=sizes(meta_network(experiment)), dropout=settings.dropout)
    except ValueError as error:
        raise experiment.error("evaluation.guidance", str(error)) from error


def _check_prompts(experiment: Config) -> None:
    """Check that the file of prompts can be read, and that the network takes text."""
    path = experiment.tree["evaluation"].get("prompts")
    if path is None:
        return
    try:
        read_prompts(located(path))
    except UserError as error:
        raise experiment.error("evaluation.prompts", str(error)) from error
    if not sizes(meta_network(experiment))["text"]:
        problem = "the network takes no text (network.text_width is 0); leave it out"
        raise experiment.error("evaluation.prompts", problem)


def _check_images(experiment: Config) -> None:
    """Check that the network is given the images that it takes, at the size that it samples."""
    data: DataConfig = config.build(experiment, "data")
    if data.image is None and not experiment.tree["network"].get("image_channels"):
        return  # other faults are told before a network is built
    network = meta_network(experiment)
    try:
        check_images(network, data)
    except UserError as error:
        raise experiment.error("data", str(error)) from error
    sampler = experiment.tree["sampler"]
    if data.image is not None and sampler.get("_target_") == PYRAMID:
        problem = "a network that takes images (data.image) samples at one size, not over a pyramid"
        raise experiment.error("sampler", problem)


def bind(experiment: Config) -> None:
    """Check every section against the signature of what it configures.

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    _check_routing(experiment)
    config.check(experiment, known=SECTIONS, required=REQUIRED)
    for key, least in {"batch_size": 1, "dataset.resolution": 1, "num_workers": 0}.items():
        section, _, name = f"data.{key}".rpartition(".")
        value = experiment.get(section).get(name)
        if type(value) is int and value < least:
            raise experiment.error(f"data.{key}", f"must be at least {least} (got {value})")
    trust.check_guide(experiment)


def _check_routing(experiment: Config) -> None:
    """Refuse to route the tokens of a network of this package that has none."""
    node = experiment.tree.get("network")
    target = node.get("_target_") if isinstance(node, Mapping) and "routing" in node else None
    if target not in MADE["network"]:
        return
    able = [name for name in MADE["network"] if "routing" in _arguments(name)]
    if target not in able:
        name = target.rpartition(".")[2]
        raise experiment.error(
            "network.routing",
            f"{name} has no tokens to route; leave it out, or take a network that has: "
            f"{', '.join(able)}",
        )


def _arguments(target: str) -> Collection[str]:
    bound = signature(locate(target))
    return () if bound is None else bound.parameters


def with_defaults(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node as JSON, completed by the defaults of its target's signature."""
    try:
        known = signature(locate(node.get("_target_")))
    except ValueError:  # of a package that is not installed: its defaults are not known
        known = None
    parameters = () if known is None else known.parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    plain: dict[str, Any] = json.loads(json.dumps({**defaults, **node}, default=str))
    return plain


def device_batch(experiment: Config, settings: TrainerConfig, devices: int) -> int:
    """Images of a step on each of all devices.

    Raises:
        ConfigError: the batch size cannot be divided so.
    """
    try:
        return settings.per_device_batch(experiment.get("data.batch_size"), devices)
    except ValueError as error:
        raise experiment.error("data.batch_size", str(error)) from error


def is_made_later(source: DatasetSpec) -> bool:
    """Whether a data set is prepared by the first training on it, and is not yet."""
    return (
        isinstance(source, Shards)
        and source.made_of is not None
        and not (Path(source.path) / MANIFEST).exists()
    )


def data_folder(source: DatasetSpec) -> Path | None:
    """The local folder or archive that a data set reads; None: remote, generated or made later."""
    if not isinstance(source, Shards | ImageFolder):
        return None
    return None if is_remote(source.path) or is_made_later(source) else Path(source.path)


def meta_network(experiment: Config, most: int | None = None) -> nn.Module:
    """The network on torch's meta device, without memory for its weights.

    Args:
        experiment: bound.
        most: tensors that it may have, so that an untrusted config cannot build modules endlessly.

    Raises:
        ConfigError: it has more.
    """
    with at_most(most), without_compiler(), torch.device("meta"):
        network: nn.Module = config.build(experiment, "network")
    return network


def sampler_of(
    experiment: Config,
    objective: TrainingObjective,
    base: Callable[[Sampler], Sampler] | None = None,
) -> Sampler | PyramidSampler:
    """The experiment's sampler.

    Args:
        experiment: bound.
        objective: of the experiment.
        base: replaces the sampler; for a pyramid, its base.

    Raises:
        ConfigError: its noise range is outside the network's, or its pyramid does not end in the
            resolution of the data.
    """
    sampler: Sampler | PyramidSampler = config.build(experiment, "sampler")
    try:
        if isinstance(sampler, PyramidSampler):
            if base is not None:
                sampler = dataclasses.replace(sampler, base=base(sampler.base))
            side = config.build(experiment, "data.dataset").resolution
            sampler.sizes(side, side)
        elif base is not None:
            sampler = base(sampler)
        check_range(sampler, objective.preconditioning.sigma_range)
    except ValueError as error:
        raise experiment.error("sampler", str(error)) from error
    return sampler
