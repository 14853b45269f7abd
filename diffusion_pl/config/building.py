"""Build objects from nodes, the innermost first: objects receive objects, never config."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from diffusion_pl.config.annotations import PATHS, element, is_node, member, origin, signature
from diffusion_pl.config.binding import SPECIAL, check_node, wrapper
from diffusion_pl.config.registry import PACKAGE
from diffusion_pl.config.targets import locate
from diffusion_pl.config.tree import Config, ConfigError, join

# What constructors raise for unsuitable values.
_MISTAKES = (
    ValueError, ArithmeticError, ImportError, LookupError, MemoryError, RuntimeError, TypeError,
)  # fmt: skip
# What others than the user wrote: there an error is about the values that the user gave.
_LIBRARIES = (PACKAGE, "torch", "lightning", "torchmetrics")


def build(config: Config, key: str, /, **extra: Any) -> Any:
    """Build what stands under a dotted key.

    A node becomes the object its `_target_` makes, or with `_partial_: true` a functools.partial of
    it; a mapping or list becomes one of the objects in it; a scalar stays. Where the annotation
    says so a list becomes a tuple, a text a Path and an int a float.

    Args:
        config: with the packages that may be imported.
        key: dotted, such as `sampler` or `evaluation.metrics.0`.
        extra: objects passed to the outermost node besides its own arguments.

    Raises:
        ConfigError: the node does not fit its signature, or a constructor raised ValueError.
    """
    check_node(config, key, extra)
    return _built(config, config.get(key), key, Any, extra)


def _built(config: Config, value: Any, key: str, annotation: Any, extra: dict[str, Any]) -> Any:
    """Build one value for a parameter of that annotation."""
    if is_node(value):
        return _called(config, value, key, extra)
    wanted = member(value, annotation, config.packages)
    if isinstance(value, dict):
        return {
            name: _built(config, child, join(key, name), element(wanted, 0), {})
            for name, child in value.items()
        }
    if isinstance(value, list):
        items = [
            _built(config, child, join(key, index), element(wanted, index), {})
            for index, child in enumerate(value)
        ]
        return tuple(items) if origin(wanted) is tuple else items
    if origin(wanted) is float:
        return float(value)  # torch would make an integer tensor of 80
    return Path(value) if origin(wanted) in PATHS else value


def _called(config: Config, node: dict[Any, Any], key: str, extra: dict[str, Any]) -> Any:
    """Build the arguments of a node, then call its target with them."""
    beside = wrapper(config, key, node)
    if beside is not None:
        name, path = beside
        inner = _called(config, {n: v for n, v in node.items() if n != name}, key, extra)
        if not node[name]:
            return inner
        around = _built(config, node[name], join(key, name), Any, {})
        return locate(path, config.packages)(**{key: inner, name: around})
    target = locate(node["_target_"], config.packages)
    bound = signature(target)
    parameters = bound.parameters if bound else {}
    arguments = dict(extra)
    for name, value in node.items():
        if name not in SPECIAL:
            annotation = parameters[name].annotation if name in parameters else Any
            arguments[name] = _built(config, value, join(key, name), annotation, {})
    if node.get("_partial_") is True:
        return functools.partial(target, **arguments)
    try:
        return target(**arguments)
    except Exception as error:
        own = str(node["_target_"]).partition(".")[0] not in _LIBRARIES
        if own and not isinstance(error, ValueError | ImportError):
            raise  # a bug in the user's class keeps its traceback
        if not isinstance(error, _MISTAKES) and not type(error).__module__.startswith("lightning."):
            raise
        reason = " ".join(str(error).split())
        if not isinstance(error, ValueError):
            reason = f"cannot be built from these values ({type(error).__name__}: {reason})"
        # The value it refuses may come from any file that set one of its arguments.
        raise ConfigError(f"{config.sources(key)}: {key}: {reason}") from error
