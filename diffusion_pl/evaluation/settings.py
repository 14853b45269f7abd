"""The `evaluation` section of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from diffusion_pl.diffusion.classifier_free import Weight
from diffusion_pl.diffusion.guidance import EVERYWHERE, Guide, Routed, check_interval
from diffusion_pl.errors import UserError
from diffusion_pl.metrics.features import Extractor, Features
from diffusion_pl.metrics.reference import Reference

Labels = Literal["random", "balanced"]


class Metric(Protocol):
    """A torchmetrics.Metric over features whose result is a dictionary of named numbers."""

    @property
    def notes(self) -> Mapping[str, Any]:
        """Recorded with the numbers, once they are computed."""

    def update(self, features: Features) -> None: ...

    def compute(self) -> Mapping[str, float]: ...

    def to(self, device: torch.device | str) -> Any: ...


class MetricSettings(Protocol):
    """A metric in YAML; builds the metric for an evaluation of `count` images.

    One whose class has `wants_captions = True` gets `Features.captions`, and images without
    captions are refused.
    """

    @property
    def wants_features(self) -> bool:
        """Whether the reference must keep the features of single images."""

    def numbers(self, extractor: Extractor) -> Sequence[str]:
        """The names of its numbers, without standard deviations."""

    def check_count(self, generated: int, real: int | None = None) -> None:
        """Raise UserError for too few images; `real` is None if not known."""

    def build(self, extractor: Extractor, reference: Reference, count: int) -> Metric: ...


@dataclass(frozen=True)
class Losses:
    """Held-out loss during training: the error at fixed noise, of averaged and raw weights.

    Args:
        every: training images between two measurements; None: as often as the evaluation.
        count: held-out images, evenly spaced over their set.
        levels: noise levels, evenly spaced in log sigma over those that the network knows, from
            0.002 to 80 at most.
        data: images that are not trained on: a prepared set, a folder or .zip, CIFAR-10's archive,
            or an experiment for its data. None: the data set's own (CIFAR-10's test images, other
            scenes of synthetic data), else the last `count` training images, and the row says so.
        seed: of the noise; image i has the same at every level and every time.
    """

    every: int | None = None
    count: int = 64
    levels: int = 8
    data: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for key, least in (("every", 1), ("count", 2), ("levels", 2)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"{key} must be at least {least} (got {value})")


@dataclass(frozen=True)
class Evaluation:
    """How a model is evaluated.

    Args:
        every: training images between two evaluations; there is one more at the end.
        count: images sampled each time.
        metrics: to compute; empty for the sample grid alone.
        batch_size: images sampled at a time on one device; changes memory, not numbers.
        seed: of noise and labels.
        labels: "random": uniform over the classes; "balanced": the classes in turn, so that their
            counts differ by one at most (JiT's protocol: 50 images of each of 1000 classes).
        prompts: file of prompts, a line each, of a model that takes text: image i has line i modulo
            their number; None: captions of the data, drawn from (seed, i).
        guidance: weight, 1 for none; or a weight for each kind of condition, such as
            {text: 3, label: 1.5}.
        guidance_interval: noise levels (low, high] that are guided.
        guide: the weaker model of autoguidance, or `Routed`: the model itself with routed tokens;
            None for the model itself without its conditions.
        grid: images on the sample grid, the first of those sampled.
        reference: file of statistics to compare with; None: computed from the training data.
        losses: held-out loss by noise level; None for none.
    """

    every: int
    count: int = 10_000
    metrics: Sequence[MetricSettings] = ()
    batch_size: int = 250
    seed: int = 0
    labels: Labels = "random"
    prompts: str | None = None
    guidance: Weight = 1.0
    guidance_interval: tuple[float, float] = EVERYWHERE
    guide: Guide | Routed | None = None
    grid: int = 64
    reference: str | None = None
    losses: Losses | None = None

    def __post_init__(self) -> None:
        check_interval(self.guidance_interval)
        if self.labels not in ("random", "balanced"):
            raise UserError(f"labels must be random or balanced (got {self.labels!r})")
        for key in ("every", "count", "batch_size", "grid"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1 (got {getattr(self, key)})")

    @property
    def wants_features(self) -> bool:
        """Whether a metric needs the features of single real images."""
        return any(metric.wants_features for metric in self.metrics)

    @property
    def wants_captions(self) -> bool:
        """Whether a metric compares images with what they were asked to show."""
        return any(map(wants_captions, self.metrics))


def wants_captions(metric: MetricSettings) -> bool:
    """Whether a metric compares images with what they were asked to show."""
    return bool(getattr(metric, "wants_captions", False))
