"""Image diffusion models in one frame: train, sample, evaluate and compare by YAML or from Python.

Nothing is imported until it is used: `import diffusion_pl` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_pl.api import Experiment, Lazy, Run, experiment, lazy, train
    from diffusion_pl.errors import UserError

__version__ = "0.1.0"

__all__ = ["Experiment", "Lazy", "Run", "UserError", "experiment", "lazy", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "errors" if name == "UserError" else "api"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
