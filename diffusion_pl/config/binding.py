"""Check nodes against the signatures they configure, before anything is built."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from diffusion_pl.config.annotations import described, fits, is_node, signature
from diffusion_pl.config.registry import PLACES, WRAPPERS, is_part, misplaced
from diffusion_pl.config.renaming import former_names
from diffusion_pl.config.targets import locate
from diffusion_pl.config.tree import Config, ConfigError, join, names, nearest

SPECIAL = ("_target_", "_partial_")

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

Problem = tuple[str, str]  # dotted key, what is wrong


def check(
    config: Config,
    *,
    sections: Sequence[str] | None = None,
    known: Sequence[str] | Mapping[str, Any] | None = None,
    required: Sequence[str] = (),
    given: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Bind every node to its callable's signature and annotations, without calling any.

    Args:
        config: as read; the modules its targets name are imported.
        sections: top-level keys to bind; all when not given.
        known: the top-level keys there may be; a mapping gives each its annotation.
        required: the top-level keys there must be, other than null.
        given: dotted key of a node to the arguments that the program passes there.

    Raises:
        ConfigError: one line for each problem, in the order of the file.
    """
    problems: list[Problem] = []
    for name, value in config.tree.items():
        if known is not None and name not in known:
            problems.append((str(name), f"unknown section{_within(config.tree, str(name), known)}"))
            continue
        if isinstance(known, Mapping) and not fits(value, known[name], config.packages):
            problems.append((str(name), _wrong_type(value, known[name], "")))
        if sections is None or name in sections:
            place = str(name) if name in PLACES else None
            problems.extend(_problems(config, value, str(name), given or {}, place))
    for name in required:
        if config.tree.get(name) is None:
            null = " (got null)" if name in config.tree else ""
            problems.append((name, f"missing section{null}; add it"))
    report(config, problems)


def check_node(config: Config, key: str, given: Collection[str]) -> None:
    """Bind one value of the configuration, and the nodes in it, as `check` does.

    Raises:
        ConfigError: one line for each problem.
    """
    place = key if key in PLACES else None
    report(config, list(_problems(config, config.get(key), key, {key: given}, place)))


def report(config: Config, problems: Sequence[Problem]) -> None:
    """Raise the problems as one error, a line each; nothing when there are none."""
    if problems:
        raise ConfigError("\n".join(str(config.error(key, what)) for key, what in problems))


def _within(tree: Mapping[str, Any], name: str, known: Collection[str]) -> str:
    """End an error line with the keys that lie deeper under this name, else the likeliest."""
    found = [key for key in _keys(tree) if key.rpartition(".")[2] == name and "." in key]
    if found:
        return nearest(found[0], found[:3], count=3)
    return nearest(name, known, former=former_names(""))


def _keys(node: Any, key: str = "") -> Iterator[str]:
    """Every dotted key of a tree, inner nodes too."""
    if key:
        yield key
    for name in names(node):
        yield from _keys(node[name], join(key, name))


def _problems(
    config: Config,
    value: Any,
    key: str,
    given: Mapping[str, Collection[str]],
    place: str | None,
    infinite: Collection[float] = (),
) -> Iterator[Problem]:
    """Find what is wrong with a value and with everything in it.

    `place` is the section, or the argument of a part, that holds the value, None where another
    callable takes it; `infinite` are the infinite numbers allowed.
    """
    if type(value) is int and not -(2**63) <= value < 2**63:
        yield key, f"must be below 2^63 (got one of {value.bit_length()} bits)"
    if isinstance(value, float) and not math.isfinite(value):
        if value not in infinite:
            yield key, f"must be finite (got {value}); write a number, or null where allowed"
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _problems(config, child, join(key, index), given, place, infinite)
    elif isinstance(value, dict):
        yield from _special(value, key)
        ours = is_node(value) and is_part(value["_target_"])
        defaults: Mapping[str, Collection[Any]] = {}
        if is_node(value):
            yield from _node(config, value, key, given.get(key, ()))
            defaults = _defaults(config, value)
        if ours and place is not None:
            what = misplaced(value["_target_"], place, value.get("_partial_") is True)
            if what is not None:
                yield join(key, "_target_"), what
        for name, child in value.items():
            within = str(name) if ours else None if is_node(value) else place
            allowed = defaults.get(str(name), ())
            yield from _problems(config, child, join(key, name), given, within, allowed)


def _defaults(config: Config, node: dict[Any, Any]) -> dict[str, Collection[Any]]:
    """The defaults of a node's arguments, or their elements: these may be infinite."""
    try:
        bound = signature(locate(node["_target_"], config.packages))
    except ValueError:
        return {}  # the node itself is reported
    defaults = {name: each.default for name, each in bound.parameters.items()} if bound else {}
    return {
        name: default if isinstance(default, tuple | list) else [default]
        for name, default in defaults.items()
    }


def wrapper(config: Config, key: str, node: Mapping[str, Any]) -> tuple[str, str] | None:
    """The argument of a section that a wrapper around it takes, and the wrapper's dotted path.

    None where there is no such argument, or the section's target takes it itself.
    """
    name, path = WRAPPERS.get(key, ("", ""))
    if name not in node:
        return None
    try:
        bound = signature(locate(node["_target_"], config.packages))
    except ValueError:
        return None  # the node itself is reported
    return None if bound is None or name in bound.parameters else (name, path)


def _special(node: dict[Any, Any], key: str) -> Iterator[Problem]:
    """Find misspelt or misplaced keys of our own."""
    for name in node:
        if str(name).startswith("_") and str(name).endswith("_") and name not in SPECIAL:
            yield join(key, name), f"unknown special key{nearest(name, SPECIAL)}"
    if "_partial_" in node:
        if not isinstance(node["_partial_"], bool):
            yield join(key, "_partial_"), f"must be true or false (got {node['_partial_']!r})"
        if "_target_" not in node:
            yield join(key, "_partial_"), "stands without _target_; name the callable"


def _node(
    config: Config, node: dict[Any, Any], key: str, given: Collection[str]
) -> Iterator[Problem]:
    """Find what is wrong with the target and the arguments of one node."""
    target = node["_target_"]
    try:
        called = locate(target, config.packages)
    except ValueError as error:
        yield join(key, "_target_"), str(error)
        return
    bound = signature(called)
    if bound is None:  # written in C and without a signature: only the call can tell
        return
    kinds = {name: parameter.kind for name, parameter in bound.parameters.items()}
    accepted = [name for name, kind in kinds.items() if kind in _BY_NAME]
    open_ended = inspect.Parameter.VAR_KEYWORD in kinds.values()
    beside = wrapper(config, key, node)
    for name, value in node.items():
        if name in SPECIAL or (str(name).startswith("_") and str(name).endswith("_")):
            continue
        if beside is not None and name == beside[0]:
            yield from _beside(config, value, join(key, name), *beside)
            continue
        if name in given:
            yield join(key, name), f"is handed to {target} by the program; remove it"
        elif name not in accepted:
            if not open_ended:
                near = nearest(name, accepted, former=former_names(key, target))
                yield join(key, name), f"unknown argument of {target}{near}"
        elif not fits(value, bound.parameters[name].annotation, config.packages):
            yield join(key, name), _wrong_type(value, bound.parameters[name].annotation, target)
    for name in given:
        if name not in accepted and not open_ended:
            yield key, f"{target} takes no {name!r}, which the program hands in; use another target"
    if node.get("_partial_") is not True:
        # A function is often meant to be handed on, not called.
        otherwise = "" if inspect.isclass(called) else ", or `_partial_: true` to hand it on"
        for name, parameter in bound.parameters.items():
            required = parameter.default is parameter.empty and parameter.kind not in _VARIADIC
            if required and name not in node and name not in given:
                yield join(key, name), f"missing argument of {target}; add it{otherwise}"


def _beside(config: Config, value: Any, key: str, name: str, path: str) -> Iterator[Problem]:
    """Find what is wrong with the type of a wrapper's argument; null is as if it was not there."""
    bound = signature(locate(path, config.packages))
    assert bound is not None
    wanted = bound.parameters[name].annotation
    if value is not None and not fits(value, wanted, config.packages):
        yield key, _wrong_type(value, wanted, path)


def _wrong_type(value: Any, annotation: Any, target: str) -> str:
    got = f"a node of {value['_target_']}" if is_node(value) else reprlib.repr(value)
    of = f" for {target}" if target else ""
    return f"must be {described(annotation)}{of} (got {got})"
