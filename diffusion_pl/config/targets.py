"""Import callables by dotted path, and restrict those of untrusted configurations."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
from collections.abc import Callable, Sequence
from typing import Any

from diffusion_pl.config.registry import OPTIMIZERS, PACKAGE, PARTS, is_part, place_in_torch
from diffusion_pl.config.tree import nearest
from diffusion_pl.errors import UserError


def locate(target: object, packages: Sequence[str] | None = None) -> Callable[..., Any]:
    """Import what a dotted path names.

    Args:
        target: such as `diffusion_pl.objectives.edm.EDM`.
        packages: None for a user's own configuration, which may name anything. Otherwise only the
            parts of this package's closed list, torch's optimizers and what lies in these packages.

    Raises:
        UserError: what is wrong with the path, as the end of an error line.
    """
    if not isinstance(target, str) or not all(target.split(".")) or "." not in target:
        raise UserError(f"must be the dotted path of a class or function (got {target!r})")
    if packages is not None and (reason := why_untrusted(target, packages)):
        raise UserError(reason)
    found, rest = _module(target)
    for part in rest:
        try:
            found = getattr(found, part)
        except AttributeError as error:
            where = getattr(found, "__name__", target)
            public = [name for name in dir(found) if _is_own(found, name)]
            raise UserError(f"{where} has no {part!r}{nearest(part, public)}") from error
    if not callable(found):
        raise UserError(f"{target} is not a class or function (it is a {type(found).__name__})")
    if packages is not None:
        _refuse_foreign(target, found, packages)
    return found


def _is_own(found: object, name: str) -> bool:
    """Whether a public name is of the package that offers it, and not imported from another."""
    value = getattr(found, name, None)
    home = str(getattr(found, "__module__", None) or getattr(found, "__name__", ""))
    root = home.partition(".")[0]
    origin = getattr(value, "__module__", None) or getattr(value, "__name__", None) or root
    return not name.startswith("_") and str(origin).partition(".")[0] == root


def why_untrusted(target: object, packages: Sequence[str]) -> str | None:
    """Why a configuration of others may not name a dotted path; None where it may.

    Args:
        target: as written.
        packages: allowed by name.
    """
    if is_part(target) or target in packages:
        return None
    if _inside(target, packages) and "._" not in str(target):
        return None
    if _inside(target, [PACKAGE]):
        return (
            f"is outside {PACKAGE}'s parts, and a file that others may have made builds those "
            f"alone (got {target!r})"
        )
    trusted = ", ".join([PACKAGE, OPTIMIZERS, *packages])
    return (
        f"is outside the trusted packages {trusted} (got {target!r}); allow its top-level package "
        f"by name if you trust whoever wrote this file: --allow {str(target).partition('.')[0]}"
    )


def check_allowed(packages: Sequence[str]) -> None:
    """Raise UserError if this package is allowed by name: its parts are known."""
    for package in packages:
        if _inside(package, [PACKAGE]):
            raise UserError(
                f"--allow: the parts of {PACKAGE} are known, the rest of it starts commands and "
                f"writes files (got {package!r}); allow the package that the file needs"
            )


def _refuse_foreign(target: str, found: Any, packages: Sequence[str]) -> None:
    """Refuse an object that is reached through a trusted name but defined elsewhere.

    Raises:
        UserError: in torch.optim neither an optimizer nor a scheduler of the learning rate, or
            defined in a package that is not allowed.
    """
    home = getattr(found, "__module__", None)
    if place := place_in_torch(target):
        from torch import optim  # the target is torch's, so it is imported

        whole = optim.Optimizer if place == "optimizer" else optim.lr_scheduler.LRScheduler
        kind = inspect.isclass(found) and issubclass(found, whole) and found is not whole
        if not kind or not _inside(home, [OPTIMIZERS]):
            raise UserError(f"{target} is no {place}, and nothing else of {OPTIMIZERS} is known")
    # mypackage.os.system begins with an allowed name and ends outside.
    elif target not in PARTS and target not in packages and not _inside(home, packages):
        raise UserError(f"{target} is defined in {home}, outside {', '.join(packages)}")


def _inside(path: object, packages: Sequence[str]) -> bool:
    return any(f"{path}.".startswith(f"{package}.") for package in packages)


def _module(target: str) -> tuple[Any, list[str]]:
    """Import the longest module that a dotted path begins with; the rest are attributes.

    Raises:
        UserError: there is no such module, or it fails while it is imported.
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
            raise UserError(f"{name} cannot be imported ({reason})") from error
        _refuse_missing_submodule(module, parts[length:])
        return module, parts[length:]
    raise UserError(f"there is no module {parts[0]!r} (got {target!r}); install it or correct it")


def _refuse_missing_submodule(module: types.ModuleType, rest: Sequence[str]) -> None:
    """Name the nearest module when a path leaves its package at a word that is no attribute.

    Raises:
        UserError: there is no such module.
    """
    # By the files, since `dir` of a package may list only its public names.
    if len(rest) > 1 and "__path__" in vars(module) and not hasattr(module, rest[0]):
        inside = [each.name for each in pkgutil.iter_modules(module.__path__)]
        raise UserError(f"{module.__name__} has no module {rest[0]!r}{nearest(rest[0], inside)}")
