"""What the tests of the configuration configure, and the shortest ways to do it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import pytest

from diffusion_pl import config
from diffusion_pl.config import Config, ConfigError

HERE = __name__


class Schedule(Protocol):
    """Quantile to noise level."""

    def __call__(self, u: float) -> float: ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """A schedule with a range check of its own."""

    start: float = 1.0
    stop: float = 2.0

    def __post_init__(self) -> None:
        if self.stop <= self.start:
            raise ValueError(f"stop must exceed start (got {self.stop})")

    def __call__(self, u: float) -> float:
        return self.start + u * (self.stop - self.start)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Takes a schedule, as the objectives do."""

    schedule: Schedule
    P_std: float
    P_mean: float = -1.2


class Plain:
    """A class that makes neither a schedule nor anything callable."""


@dataclasses.dataclass(frozen=True)
class Typed:
    """One parameter of every kind that YAML may set."""

    integer: int = 1
    real: float = 1.0
    text: str = ""
    flag: bool = False
    maybe: int | None = None
    choice: Literal["small", "large", 1] = "small"
    pair: tuple[float, float] = (0.0, 1.0)
    sizes: tuple[int, ...] = ()
    names: Sequence[str] = ()
    steps: list[int] | None = None
    share: Mapping[int, float] = dataclasses.field(default_factory=dict)
    folder: Path = Path()
    call: Callable[[float], float] = abs
    schedule: Schedule | None = None
    linear: Linear | None = None
    size: Named | None = None
    either: int | str = 0
    unknown: NotDefinedAnywhere = None  # noqa: F821


class Named(NamedTuple):
    """A named tuple is bound by its fields."""

    width: int


def make_linear(stop: float) -> Linear:
    return Linear(stop=stop)


def make_plain() -> Plain:
    return Plain()


class Scaled:
    """A class that is no dataclass: its annotations stand at its constructor alone."""

    def __init__(self, width: int, scale: float | int = 1.0) -> None:
        self.width, self.scale = width, scale


def make_nothing() -> None:
    return None


def collect(**anything: Any) -> dict[str, Any]:
    return anything


def step(x: float, size: float, noise: Callable[[float], float]) -> float:
    return x + size * noise(x)


def sampled(schedule: Schedule) -> None:
    """Wants a protocol and nothing else."""


LINEAR = {"_target_": f"{HERE}.Linear"}


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(text.replace("HERE", HERE), encoding="utf-8")
    return file


def line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    """The message, which must be one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


def checked(tree: dict[str, Any], **options: Any) -> list[str]:
    """The lines `check` reports for a tree, without the file in front."""
    try:
        config.check(Config("x", "x.yaml", tree), **options)
    except ConfigError as error:
        lines = str(error).split("\n")
        assert all(each.startswith("x.yaml: ") for each in lines)
        return [each.removeprefix("x.yaml: ") for each in lines]
    return []


def typed(name: str, value: Any) -> list[str]:
    return checked({"node": {"_target_": f"{HERE}.Typed", name: value}})


def experiments_folder(folder: Path) -> Path:
    """A base and one experiment over it."""
    write(
        folder,
        "base",
        """
        # plumbing
        seed: 0
        optimizer:
          _target_: HERE.Typed
          real: 1e-3
          integer: 4
        data:
          batch_size: 1_000_000
          sizes: [1, 2]
        trainer:
          batch_size: ${data.batch_size}
        features: null
        """,
    )
    write(
        folder,
        "edm",
        """
        # FID 1.79 at 35 evaluations (Karras 2022, Table 2)
        defaults: base
        objective:
          _target_: HERE.Objective
          P_std: 1.2
          schedule: {_target_: HERE.Linear}
        optimizer:
          real: 2e-3
        """.replace("\n        ", "\n"),
    )
    return folder
