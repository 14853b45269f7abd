"""Keeping torch's compiler out of commands that compile nothing."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

_COMPILER = "torch._dynamo"


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Keep torch from importing its compiler, which takes longer than all else of `check`.

    Optimizers import it when they are made and at every step, random numbers on the meta device at
    the first, only to tell it what not to trace. So for the while a module that does nothing has
    its name; whoever uses more of the compiler gets that from the compiler itself.
    """
    if _COMPILER in sys.modules:
        yield
        return
    untraced: list[Any] = []

    def disable(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
        untraced.append(function)
        return function

    stand_in = ModuleType(_COMPILER)
    vars(stand_in).update(disable=disable, graph_break=lambda: None, __getattr__=_of_compiler)
    vars(torch)["_dynamo"] = sys.modules[_COMPILER] = stand_in
    try:
        yield
    finally:
        _remove(stand_in)
        for name in ("disable", "graph_break"):  # for whoever keeps the module
            del vars(stand_in)[name]
        for function in untraced:  # torch remembers the answer for the process
            vars(function).pop("__dynamo_disable", None)


def _of_compiler(name: str) -> Any:
    """What the compiler itself has by a name."""
    _remove(sys.modules.get(_COMPILER))
    return getattr(importlib.import_module(_COMPILER), name)


def _remove(module: ModuleType | None) -> None:
    """Remove the module that does nothing, if it is there still."""
    if module and module.__spec__ is None and sys.modules.get(_COMPILER) is module:
        del sys.modules[_COMPILER], vars(torch)["_dynamo"]
