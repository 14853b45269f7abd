"""Objects as nodes of a configuration: what a run records to build its parts again."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusion_pl.config.targets import locate
from diffusion_pl.errors import UserError


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A callable with its arguments, called when an experiment is built.

    Args:
        target: dotted path.
        arguments: plain values, `Lazy` ones, or objects as `Experiment` takes them.
        partial: pass on a functools.partial instead of calling it.
    """

    target: str
    arguments: Mapping[str, Any]
    partial: bool = False


def lazy(target: Callable[..., Any] | str, /, *, _partial_: bool = False, **arguments: Any) -> Lazy:
    """A part of an experiment, recorded in its run as YAML's `_target_` and arguments.

    Args:
        target: a class or function that can be imported, or its dotted path.
        _partial_: pass on a functools.partial instead of calling it, as for optimizers.
        arguments: of the target.

    Raises:
        UserError: it cannot be imported by its name, so a run with it could not be opened again.
    """
    return Lazy(target if isinstance(target, str) else import_path(target), arguments, _partial_)


def import_path(target: Callable[..., Any]) -> str:
    """The dotted path by which a class or function can be imported.

    Raises:
        UserError: there is none.
    """
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not module or not name:
        raise UserError(f"{target!r}: is not a class or function; pass one, or its dotted path")
    if module == "__main__":
        raise UserError(
            f"{name}: is defined in the running script or notebook, so a run with it could not be "
            "opened again; move it to a module and import it from there"
        )
    path = f"{module}.{name}"
    try:
        found: Any = locate(path)
    except ValueError as error:
        raise UserError(
            f"{path}: cannot be imported by this name ({error}), so a run with it could not be "
            "opened again; define it at the top level of a module"
        ) from error
    if found is not target:
        raise UserError(f"{path}: imports another object than the one given")
    return path


def plain(value: Any, where: str) -> Any:
    """A value as YAML holds it: an object becomes its `_target_` and arguments.

    Args:
        value: plain, `lazy(...)`, a dataclass instance, a functools.partial, or a class or function
            to pass on.
        where: its key, for messages.

    Raises:
        UserError: an object whose arguments cannot be known.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {name: plain(each, f"{where}.{name}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, f"{where}.{index}") for index, each in enumerate(value)]
    partial, arguments = False, dict[str, Any]()
    if isinstance(value, functools.partial) and not value.args:
        target, arguments, partial = import_path(value.func), value.keywords, True
    elif isinstance(value, Lazy):
        target, arguments, partial = value.target, dict(value.arguments), value.partial
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        target = import_path(type(value))  # defaults are recorded too
        arguments = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    elif inspect.isclass(value) or inspect.isroutine(value):
        target, partial = import_path(value), True
    else:
        name = type(value).__name__
        raise UserError(
            f"{where}: a run records the arguments of its parts, and those of this {name} are not "
            f"known; pass dp.lazy({name}, ...) with its arguments"
        )
    node = {name: plain(each, f"{where}.{name}") for name, each in arguments.items()}
    return {"_target_": target, **({"_partial_": True} if partial else {}), **node}
