"""Values that an untrusted configuration may not set.

Its parts are restricted (`config.registry`), but some of them reach beyond the run: an address is
downloaded, a folder is written, a TorchScript file is executed. They are refused where they are
used, unless the user allows them by `--allow` or sets them as an override.
"""

from __future__ import annotations

import dataclasses
import os

from diffusion_pl import config
from diffusion_pl.config import Config
from diffusion_pl.config.reading import OVERRIDE
from diffusion_pl.config.registry import is_part
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.shards import Shards
from diffusion_pl.io.cache import is_remote
from diffusion_pl.metrics.features import Extractor


def data_of(experiment: Config) -> DataConfig:
    """The experiment's data, to be prepared and read.

    Raises:
        ConfigError: as `check_data`.
    """
    check_data(experiment)
    data: DataConfig = config.build(experiment, "data")
    if experiment.packages is not None and isinstance(data.dataset, Shards):
        # An untrusted config does not prepare data; prepared data is read.
        return dataclasses.replace(data, dataset=dataclasses.replace(data.dataset, made_of=None))
    return data


def extractor_of(experiment: Config) -> Extractor:
    """The experiment's feature extractor, with its weights.

    Raises:
        ConfigError: as `check_features`.
    """
    check_features(experiment)
    extractor: Extractor = config.build(experiment, "features")
    return extractor


def check_training(experiment: Config) -> None:
    """Check what a training would read, write and send, before its folder is made.

    Raises:
        ConfigError: an untrusted file names Weights & Biases, which uploads the log, or a folder
            for a profiler's reports; or as `check_data` and `check_features`.
    """
    check_data(experiment)
    held_out_of(experiment)
    check_features(experiment)
    trainer = experiment.get("trainer")
    profiler = trainer.get("profiler")
    if isinstance(profiler, dict) and (folder := profiler.get("dirpath")) is not None:
        _require(experiment, "trainer.profiler.dirpath", str(folder), "is written to")
    if "wandb" in (trainer.get("loggers") or ()):
        _require(experiment, "trainer.loggers", "wandb", "sends what is logged to others")
        if (entity := trainer.get("wandb_entity")) is not None:
            _require(experiment, "trainer.wandb_entity", entity, "is whom the log is sent to")


def check_data(experiment: Config) -> None:
    """Refuse an address, or a cache folder outside the present one, in an untrusted file.

    Raises:
        ConfigError: names its key.
    """
    node = experiment.get("data.dataset")
    path = str(node.get("path", ""))
    if is_part(node.get("_target_")) and is_remote(path):
        _require(experiment, "data.dataset.path", path, "is an address, and nothing is fetched")
        _require_folder(experiment, "data.dataset.cache_folder", str(node.get("cache_folder", ".")))


def held_out_of(experiment: Config) -> str | None:
    """What `evaluation.losses.data` names, if anything.

    Raises:
        ConfigError: an address, in an untrusted file.
    """
    named = (experiment.get("evaluation").get("losses") or {}).get("data")
    if named is not None and is_remote(named):
        _require(
            experiment, "evaluation.losses.data", named, "is an address, and nothing is fetched"
        )
    return None if named is None else str(named)


def check_features(experiment: Config) -> None:
    """Refuse weights that execute code when loaded, in an untrusted file.

    Raises:
        ConfigError: names their key.
    """
    node = experiment.get("features")
    weights = node.get("weights")
    name = str(node.get("name"))
    if weights is not None and name.startswith("clip-"):
        _require(experiment, "features.weights", weights, "is TorchScript, which runs when read,")
    if name.startswith("dinov2-"):
        _require(experiment, "features.name", name, "runs what it fetches, and nothing is fetched")


def check_guide(experiment: Config) -> None:
    """Check that a guide is trusted with no more packages than its run.

    Raises:
        ConfigError: its `allow` names more.
    """
    node = experiment.get("evaluation").get("guide")
    if node is None or not is_part(node.get("_target_")):
        return
    for package in node.get("allow") or ():
        _require(experiment, "evaluation.guide.allow", package, "is trusted by no one here")


def _require(experiment: Config, key: str, value: str, what: str) -> None:
    """Refuse a value that is neither the user's own nor allowed by name."""
    if experiment.packages is None or experiment.origin(key) == OVERRIDE:
        return
    # Addresses are chained by ::, and the last decides.
    inside = "::" not in value and any(
        value.startswith(f"{each.rstrip('/')}/") for each in experiment.packages
    )
    if not inside and value not in experiment.packages:
        raise experiment.error(
            key,
            f"{what} at the word of a file that others may have made (got {value!r}); if you "
            f"trust it: --allow {value}, or set {key} yourself",
        )


def _require_folder(experiment: Config, key: str, folder: str) -> None:
    """Refuse a folder to write in outside the present one, unless it is the user's own."""
    plain = os.path.normpath(folder)
    if os.path.isabs(plain) or plain.split(os.sep)[0] == os.pardir:
        _require(experiment, key, plain, "is written to, and would be")
