"""Callables from dotted paths, and which packages an untrusted configuration may name."""

from __future__ import annotations

import importlib
import pkgutil
import types
from collections.abc import Callable, Sequence
from typing import Any

from diffusion_pl.config.tree import nearest

OWN_PACKAGES = ("diffusion_pl", "torch.optim")


def locate(target: object, packages: Sequence[str] | None = None) -> Callable[..., Any]:
    """Import what a dotted path names.

    Args:
        target: such as `diffusion_pl.objectives.edm.EDM`.
        packages: where it must come from; None for anywhere.

    Raises:
        ValueError: what is wrong with the path, as the end of an error line.
    """
    if not isinstance(target, str) or not all(target.split(".")) or "." not in target:
        raise ValueError(f"must be the dotted path of a class or function (got {target!r})")
    if packages is not None and not trusted(target, packages):
        raise ValueError(f"is outside the trusted packages {', '.join(packages)} (got {target!r})")
    found, rest = _module(target)
    for part in rest:
        try:
            found = getattr(found, part)
        except AttributeError as error:
            where = getattr(found, "__name__", target)
            public = [name for name in dir(found) if not name.startswith("_")]
            raise ValueError(f"{where} has no {part!r}{nearest(part, public)}") from error
    if not callable(found):
        raise ValueError(f"{target} is not a class or function (it is a {type(found).__name__})")
    home = getattr(found, "__module__", None)
    # diffusion_pl.cli.os.system begins with a trusted name and ends outside.
    if packages is not None and not _inside(home, packages):
        raise ValueError(f"{target} is defined in {home}, outside {', '.join(packages)}")
    return found


def trusted(target: object, packages: Sequence[str]) -> bool:
    """Tell whether a dotted path lies within one of the packages, and is public."""
    return _inside(target, packages) and "._" not in str(target)


def _inside(path: object, packages: Sequence[str]) -> bool:
    return any(f"{path}.".startswith(f"{package}.") for package in packages)


def _module(target: str) -> tuple[Any, list[str]]:
    """Import the longest module that a dotted path begins with; the rest are attributes.

    Raises:
        ValueError: there is no such module, or it fails while it is imported.
    """
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            module = importlib.import_module(name)
        except Exception as error:  # whatever a module does while it is imported
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                continue
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{name} cannot be imported ({reason})") from error
        _refuse_missing_submodule(module, parts[length:])
        return module, parts[length:]
    raise ValueError(f"there is no module {parts[0]!r} (got {target!r}); install it or correct it")


def _refuse_missing_submodule(module: types.ModuleType, rest: Sequence[str]) -> None:
    """Name the nearest module when a path leaves its package at a word that is no attribute.

    Raises:
        ValueError: there is no such module.
    """
    if len(rest) > 1 and rest[0] not in dir(module) and "__path__" in dir(module):
        inside = [each.name for each in pkgutil.iter_modules(module.__path__)]
        raise ValueError(f"{module.__name__} has no module {rest[0]!r}{nearest(rest[0], inside)}")
