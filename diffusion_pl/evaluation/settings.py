"""What the `evaluation` node of an experiment says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from diffusion_pl.diffusion.guidance import EVERYWHERE, Guide, check_interval
from diffusion_pl.errors import UserError
from diffusion_pl.metrics.features import Extractor, Features
from diffusion_pl.metrics.reference import Reference


class Metric(Protocol):
    """A torchmetrics.Metric over features whose result is a dictionary of named numbers."""

    @property
    def notes(self) -> Mapping[str, Any]:
        """What is to be said beside the numbers, once they are computed."""

    def update(self, features: Features) -> None: ...

    def compute(self) -> Mapping[str, float]: ...

    def to(self, device: torch.device | str) -> Any: ...


class MetricSettings(Protocol):
    """What YAML names: builds a metric of an evaluation of `count` images."""

    @property
    def wants_features(self) -> bool:
        """Whether the reference must keep the features of single images."""

    def numbers(self, extractor: Extractor) -> Sequence[str]:
        """What it measures, by name, beside spreads."""

    def check_count(self, generated: int, real: int | None = None) -> None:
        """Refuse counts that cannot be measured, before any work; `real` is None if not known."""

    def build(self, extractor: Extractor, reference: Reference, count: int) -> Metric: ...


@dataclass(frozen=True)
class Evaluation:
    """How a model is measured.

    Args:
        every: images of training between two evaluations; one more comes at the end.
        count: images drawn and measured each time.
        metrics: what is measured; empty draws the grid only.
        batch_size: images drawn at a time on one device; changes the memory, not the numbers.
        seed: of the noise and the labels.
        guidance: weight of the guidance, 1 for none.
        guidance_interval: noise levels (low, high] that are guided.
        guide: the weaker model of autoguidance; None for the model itself without its label.
        grid: images on the sample grid, the first of those measured.
        reference: a file of statistics to compare with; None: those of the training data, computed
            once.
    """

    every: int
    count: int = 10_000
    metrics: Sequence[MetricSettings] = ()
    batch_size: int = 250
    seed: int = 0
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = EVERYWHERE
    guide: Guide | None = None
    grid: int = 64
    reference: str | None = None

    def __post_init__(self) -> None:
        check_interval(self.guidance_interval)
        for key in ("every", "count", "batch_size", "grid"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1 (got {getattr(self, key)})")

    @property
    def wants_features(self) -> bool:
        """Whether some metric compares with single real images."""
        return any(metric.wants_features for metric in self.metrics)
