"""Former names, so that old experiments, runs and checkpoints still open.

A name that is given up is an entry of one table. `convert` rewrites a run in current names.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from diffusion_pl.config.registry import PACKAGE
from diffusion_pl.config.tree import ConfigError, join, names, step

# The old name to the new one, of
# - a module, class or function, by its dotted path: a `_target_` that begins with it is renamed;
# - a key, by its dotted path, such as "trainer.total_images"; it may move to another section;
# - an argument, "<current path of its target>:<argument>" to the new argument, wherever the target
#   stands.
# A new name that is given up in turn gets an entry of its own; the older entry stays.
RENAMED: dict[str, str] = {
    "diffusion_pl.data.originals.Asked": "diffusion_pl.data.sources.base.SourceSpec",
    "diffusion_pl.metrics.features.load": "diffusion_pl.metrics.extractors.load",
    f"{PACKAGE}.metrics.frechet": f"{PACKAGE}.metrics.fid",
    f"{PACKAGE}.metrics.kernel": f"{PACKAGE}.metrics.kid",
    "trainer.images": "trainer.total_images",
    "trainer.clip": "trainer.grad_clip",
    "trainer.label_dropout": "trainer.dropout.label",
    "trainer.warmup": "lr_schedule.warmup",
    "trainer.decay_from": "lr_schedule.decay_from",
    "trainer.cooldown": "lr_schedule.cooldown",
    "network.octaves": "network.position_frequencies",
    "network.recompute": "network.activation_checkpointing",
    "network.variance": "network.learned_variance",
    f"{PACKAGE}.diffusion.objective.NoiseError": f"{PACKAGE}.diffusion.objective.EpsWeight",
    f"{PACKAGE}.diffusion.weights.ImageError": f"{PACKAGE}.diffusion.weights.X0Weight",
    f"{PACKAGE}.objectives.rectified_flow.FlowError": (
        f"{PACKAGE}.objectives.rectified_flow.FlowWeight"
    ),
    f"{PACKAGE}.samplers.dpmpp_2m": f"{PACKAGE}.samplers.dpm_solver",
    # What was called 3M then is the rule of order 3.
    f"{PACKAGE}.samplers.dpmpp_3m.dpmpp_3m": (
        f"{PACKAGE}.samplers.exponential_adams.exponential_adams"
    ),
    f"{PACKAGE}.samplers.sampler.Sampler:clip": "clip_denoised",
    f"{PACKAGE}.samplers.euler.euler:clip": "clip_denoised",
    **{f"{PACKAGE}.objectives.ddpm.Predict{kind}:spread": "timestep_scale"
       for kind in ("Noise", "Image", "Velocity")},
    f"{PACKAGE}.training.settings.Settings": f"{PACKAGE}.training.settings.TrainerConfig",
    "data.workers": "data.num_workers",
    "data.shares": "data.resolution_weights",
    f"{PACKAGE}.data.crops.Crop:told": "return_position",
    # A data set's own arguments; where its `_target_` stands beside them, see `dataset_apart`.
    **{
        f"data.{name}": f"data.dataset.{name}"
        for name in (
            "cache", "cache_bytes", "cache_folder", "channels", "count", "fit", "grounds", "labels",
            "made_of", "path", "resolution", "seed", "shapes", "skip_broken", "split", "window",
        )
    },
}  # fmt: skip
# Sections that an earlier version did not have, with the targets of its behaviour.
LATER = {"lr_schedule": f"{PACKAGE}.training.lr_schedule.WarmupDecay"}
DATA = f"{PACKAGE}.data.loader.DataConfig"
# Former and current keys of the section `data` that are not of the data set.
_BATCHES = ("batch_size", "workers", "num_workers", "hflip", "shares", "resolution_weights", "crop")

logger = logging.getLogger(__name__)


def target_now(target: Any) -> Any:
    """The current name of a `_target_`."""
    parts = target.split(".") if isinstance(target, str) else []
    for length in range(len(parts), 1, -1):
        if new := RENAMED.get(".".join(parts[:length])):
            return target_now(".".join([new, *parts[length:]]))
    return target


def key_now(key: str) -> str:
    """The current name of a dotted key, also of one below a renamed key."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if new := RENAMED.get(".".join(parts[:length])):
            return key_now(".".join([new, *parts[length:]]))
    return key


def argument_now(node: Any, name: Any) -> Any:
    """The current name of a node's argument."""
    target = target_now(node.get("_target_")) if isinstance(node, Mapping) else None
    new = RENAMED.get(f"{target}:{name}")
    return argument_now(node, new) if new else name


def former_names(key: str, target: object = None) -> dict[str, str]:
    """Former names below a dotted key ("": of sections), each with its current name.

    Args:
        key: dotted.
        target: of the node at this key.
    """
    found = {}
    for old in RENAMED:
        if old.startswith(f"{target}:"):
            name = old.partition(":")[2]
            found[name] = argument_now({"_target_": target}, name)
        elif not old.startswith(PACKAGE) and old.rpartition(".")[0] == key:
            found[old.rpartition(".")[2]] = key_now(old).removeprefix(f"{key}.")
    return found


def renamed(
    tree: dict[str, Any], below: Mapping[str, Any] | None = None, source: str | None = None
) -> dict[str, Any]:
    """A configuration in current names.

    Args:
        tree: plain containers; not changed.
        below: what it will be merged onto, in current names; its targets may own the arguments.
        source: the user's own file, to warn of each former name once; None warns of none.

    Raises:
        ConfigError: a new name stands beside its old one.
    """
    if is_dataset(tree.get("data")):
        warn_once(source, "data._target_", "data.dataset._target_")
        tree = {**tree, "data": dataset_apart(tree["data"])}
    given = tree.keys()
    for old in sorted(RENAMED, key=lambda name: -name.count(".")):
        if not old.startswith(PACKAGE):
            tree = _moved(tree, old, source)
    for section in LATER.keys() & (tree.keys() - given):
        if not (below or {}).get(section):  # the move made it, of the only kind there was
            tree = {**tree, section: {"_target_": LATER[section], **tree[section]}}
    return renamed_node(tree, below, "", source)


def with_later_sections(tree: dict[str, Any]) -> dict[str, Any]:
    """Add the sections that came later to a configuration, with the former behaviour."""
    for section, target in LATER.items() if "trainer" in tree else ():
        node = tree.setdefault(section, {})
        if isinstance(node, dict):
            node.setdefault("_target_", target)
    return tree


def is_dataset(data: Any) -> bool:
    """Whether a section `data` has the former layout, the data set and its batches in one node."""
    return isinstance(data, Mapping) and data.get("_target_", DATA) != DATA


def dataset_apart(data: Mapping[Any, Any]) -> dict[Any, Any]:
    """A section `data` of the former layout in the current one."""
    batches = {name: value for name, value in data.items() if name in _BATCHES}
    dataset = {name: value for name, value in data.items() if name not in _BATCHES}
    return {"_target_": DATA, "dataset": dataset, **batches}


def replaces_data(own: Mapping[str, Any], below: Mapping[str, Any]) -> bool:
    """Whether `data` of the former layout names another data set, and so inherits nothing."""
    node, lower = own.get("data"), (below.get("data") or {}).get("dataset")
    if not is_dataset(node) or not isinstance(lower, Mapping):
        return False
    target = lower.get("_target_", "")
    return bool(target) and target_now(node["_target_"]) != target  # type: ignore[index]


def _moved(tree: dict[str, Any], old: str, source: str | None) -> dict[str, Any]:
    """Move the value of a former key to its current key."""
    node: Any = tree
    for part in old.split("."):
        if not isinstance(node, dict) or part not in node:
            return tree
        node = node[part]
    new = key_now(old)
    warn_once(source, old, new)
    rest = _set(tree, old.split("."))
    if _is_set(rest, new.split(".")):
        raise _twice(source, old, new)
    return _set(rest, new.split("."), node)


def _is_set(node: Any, parts: list[str]) -> bool:
    """Whether a nested key has a value, be it null, or stands below one that is no mapping."""
    if not parts or not isinstance(node, dict):
        return True
    return parts[0] in node and _is_set(node[parts[0]], parts[1:])


def _set(node: Any, parts: list[str], *value: Any) -> dict[str, Any]:
    """Set a nested value in a copy of a mapping; without a value, remove the key."""
    kept = {name: each for name, each in (node or {}).items() if [name] != parts or value}
    if parts[1:]:
        return {**kept, parts[0]: _set(kept.get(parts[0]), parts[1:], *value)}
    return kept | dict(zip(parts, value, strict=False))


def renamed_node(value: Any, below: Any, key: str, source: str | None) -> Any:
    """A value with current targets and arguments; arguments as for `renamed`."""
    if isinstance(value, list):
        return [renamed_node(each, None, join(key, at), source) for at, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    lower = below if isinstance(below, Mapping) else {}
    now: dict[Any, Any] = {}
    for name, child in value.items():
        new = argument_now({**lower, **value}, name)
        if new != name:
            warn_once(source, join(key, name), join(key, new))
        if new in now or (new != name and new in value):
            raise _twice(source, join(key, name), new)
        now[new] = renamed_node(child, lower.get(new), join(key, name), source)
    if "_target_" in now:
        now["_target_"] = target_now(value["_target_"])
        if now["_target_"] != value["_target_"]:
            warn_once(source, value["_target_"], now["_target_"])
    return now


def key_in(tree: Any, key: str) -> str:
    """The current name of a dotted key into a configuration, including arguments on the way."""
    node, done = tree, []
    for part in key_now(key).split("."):
        name = part if step(node, part) is not None else argument_now(node, part)
        done.append(name)
        node = node[step(node, name)] if step(node, name) in names(node) else None
    return ".".join(done)


def key_of(tree: Any, key: str, value: Any) -> str:
    """The current name of a dotted key that is set to a value."""
    if key == "data._target_" and is_dataset({"_target_": value}):
        return "data.dataset._target_"
    return key_in(tree, key)


def outer_first(key: str) -> tuple[int, bool]:
    """Sort dotted keys, by their current names: outer ones, a `_target_`, then its arguments."""
    parts = key_now(key).split(".")
    return len(parts), parts[-1] != "_target_"


def refuse_twice(spelt: dict[str, str], key: str, now: str, source: str) -> None:
    """Note by which name a key came; the same name may come again.

    Args:
        spelt: the current name of each key that came, with the name it came by; is added to.
        key: the name it comes by.
        now: its current name.
        source: where it comes from, for the message.

    Raises:
        ConfigError: it came by another name.
    """
    if (other := spelt.setdefault(now, key)) != key:
        raise _twice(source, other if key == now else key, now)


def _twice(source: str | None, old: str, new: str) -> ConfigError:
    where = f"{source}: " if source else ""
    return ConfigError(f"{where}{old}: is the former name of {new}, which is set too; remove one")


@functools.cache
def warn_once(source: str | None, old: str, new: str) -> None:
    """Warn of a former name in the user's own file, once for each file and name."""
    if source is not None:
        logger.warning("%s: %s is now called %s; rename it there", source, old, new)
