"""Signatures with their annotations resolved, and whether a value from YAML fits one."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import os
import pathlib
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from diffusion_pl.config.targets import locate

PATHS = (os.PathLike, pathlib.PurePath, pathlib.Path)

_ANYTHING = (Any, object, inspect.Parameter.empty)
_LISTS = (
    list,
    collections.abc.Sequence,
    collections.abc.MutableSequence,
    collections.abc.Collection,
    collections.abc.Iterable,
)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def is_node(value: object) -> bool:
    """Tell whether a value names a callable to build it."""
    return isinstance(value, dict) and "_target_" in value


def signature(target: Callable[..., Any]) -> inspect.Signature | None:
    """Read a signature with every annotation that can be resolved resolved, the others as Any.

    Returns:
        None for a callable without one, such as some written in C.
    """
    try:
        bound = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    hints: dict[str, Any] = {}
    if inspect.isclass(target):
        # The fields of a dataclass or named tuple, each resolved in the module that wrote it.
        if dataclasses.is_dataclass(target) or issubclass(target, tuple):
            hints |= _hints(target)
        hints |= _hints(target.__init__)
    else:
        hints |= _hints(inspect.unwrap(target))
    parameters = [
        parameter.replace(annotation=hints.get(name, _evaluated(parameter.annotation)))
        for name, parameter in bound.parameters.items()
    ]
    returned = hints.get("return", _evaluated(bound.return_annotation))
    return bound.replace(parameters=parameters, return_annotation=returned)


def _evaluated(annotation: Any) -> Any:
    return Any if isinstance(annotation, str) else annotation


def _hints(owner: Any) -> dict[str, Any]:
    """Resolve annotations; one by one where some name only exists for the type checker."""
    try:
        return typing.get_type_hints(owner)
    except Exception:  # an annotation is any expression
        pass
    hints: dict[str, Any] = {}
    scope = getattr(owner, "__globals__", None) or vars(inspect.getmodule(owner))
    for name, annotation in getattr(owner, "__annotations__", {}).items():
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            hints |= typing.get_type_hints(alone, globalns=scope)
        except Exception:
            hints.setdefault(name, Any)
    return hints


def origin(annotation: Any) -> Any:
    """Reduce an annotation to what is before the brackets."""
    if isinstance(annotation, dataclasses.InitVar):
        return origin(annotation.type)
    if isinstance(annotation, typing.NewType):
        return origin(annotation.__supertype__)
    return typing.get_origin(annotation) or annotation


def _members(annotation: Any) -> tuple[Any, ...]:
    union = origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def member(value: Any, annotation: Any, packages: Sequence[str] | None) -> Any:
    """Choose the member of a union that a value is meant for: its own type, or the first to fit."""
    members = _members(annotation)
    exact = [each for each in members if origin(each) is type(value)]
    fitting = (each for each in members if fits(value, each, packages))
    return exact[0] if exact and fits(value, exact[0], packages) else next(fitting, Any)


def element(annotation: Any, index: int) -> Any:
    """Find the annotation of one value of a list, or of every value of a mapping."""
    arguments = typing.get_args(annotation)
    kind = origin(annotation)
    if not arguments:
        return Any
    if kind in _MAPPINGS:
        return arguments[-1]
    if kind is tuple and arguments[-1] is not Ellipsis:
        return arguments[index] if index < len(arguments) else Any
    return arguments[0]


def fits(value: Any, annotation: Any, packages: Sequence[str] | None) -> bool:
    """Tell whether a value from YAML, or the object its node makes, is of an annotated type.

    Everything fits an unknown annotation; whether a number is finite is checked elsewhere.

    Args:
        value: plain containers and scalars.
        annotation: resolved.
        packages: that nodes in the value may come from; None for any.
    """
    members = _members(annotation)
    if len(members) > 1:
        return any(fits(value, each, packages) for each in members)
    kind = origin(annotation)
    if any(kind is each for each in _ANYTHING):
        return True
    if is_node(value):
        return _made(value, kind, packages)
    if kind is typing.Literal:
        choices = typing.get_args(annotation)
        return any(value == each and type(value) is type(each) for each in choices)
    if kind is tuple or kind in _LISTS:
        return isinstance(value, list) and _fit_elements(value, annotation, packages)
    if kind in _MAPPINGS:
        return isinstance(value, dict) and _fit_items(value, annotation, packages)
    return _fits_scalar(value, kind)


def _fits_scalar(value: Any, kind: Any) -> bool:
    if kind is None or kind is types.NoneType:
        return value is None
    if kind in (bool, int, str):
        return type(value) is kind
    if kind is float:
        return type(value) in (int, float)
    if kind in PATHS:
        return isinstance(value, str)
    if typing.is_typeddict(kind):
        return isinstance(value, dict)
    if kind is collections.abc.Callable or _is_protocol(kind):
        return False  # only a node makes one
    return isinstance(value, kind) if inspect.isclass(kind) and kind is not type else True


def _fit_elements(values: list[Any], annotation: Any, packages: Sequence[str] | None) -> bool:
    arguments = typing.get_args(annotation)
    fixed = origin(annotation) is tuple and arguments and arguments[-1] is not Ellipsis
    if fixed and len(values) != len(arguments):
        return False
    return all(fits(each, element(annotation, i), packages) for i, each in enumerate(values))


def _fit_items(values: dict[Any, Any], annotation: Any, packages: Sequence[str] | None) -> bool:
    arguments = typing.get_args(annotation)
    names = arguments[0] if arguments else Any
    return all(
        fits(name, names, packages) and fits(each, element(annotation, 0), packages)
        for name, each in values.items()
    )


def _is_protocol(kind: Any) -> bool:
    return getattr(kind, "_is_protocol", False) is True


def _made(node: dict[str, Any], kind: Any, packages: Sequence[str] | None) -> bool:
    """Tell whether what a node's target makes can be of a type, as far as it is annotated."""
    try:
        target = locate(node["_target_"], packages)
    except ValueError:
        return True  # the node itself is reported
    if kind is None or kind is typing.Literal:
        return False
    returned: Any = target if inspect.isclass(target) else None
    if node.get("_partial_") is True:
        returned = functools.partial
    elif returned is None:
        bound = signature(target)
        returned = origin(bound.return_annotation) if bound else Any
        if returned is None or returned is types.NoneType:
            return False
    if not inspect.isclass(returned) or any(returned is each for each in _ANYTHING):
        return True
    if kind is collections.abc.Callable:
        return any("__call__" in vars(each) for each in returned.__mro__)
    unknown = not inspect.isclass(kind) or typing.is_typeddict(kind)
    if unknown or _is_protocol(kind) or _is_protocol(returned):
        return True
    # A function may return a subclass or a superclass; a class makes exactly itself.
    return issubclass(returned, kind) or (returned is not target and issubclass(kind, returned))


def described(annotation: Any) -> str:
    """Say what an annotation wants of a YAML value."""
    members = _members(annotation)
    if len(members) > 1:
        said = ["null" if each is types.NoneType else described(each) for each in members]
        return " or ".join(sorted(said, key=lambda words: words.startswith("a node")))
    if origin(annotation) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(annotation)))}"
    text = inspect.formatannotation(annotation).replace("NoneType", "None")
    kind = origin(annotation)
    only_node = inspect.isclass(kind) and kind.__module__ not in ("builtins", "pathlib", "os")
    containers = (*_LISTS, *_MAPPINGS)
    if kind is collections.abc.Callable and typing.get_args(annotation) == (..., Any):
        return "a node with _target_"
    if kind is collections.abc.Callable or (only_node and kind not in containers):
        return f"a node with _target_ that makes {text}"
    return text
