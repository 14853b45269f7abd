"""Evaluation: draw images and measure them, one function for the training run and the command.

Image i's noise and label come from (seed, i) alone, so the numbers depend neither on the batch size
nor on the number of devices. Bytes are what is measured, as they would be saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_pl.diffusion.guidance import EVERYWHERE, Guide, check_interval, guided
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.recording import Counted
from diffusion_pl.images import to_bytes
from diffusion_pl.metrics import reference as references
from diffusion_pl.metrics.features import Extractor, Features
from diffusion_pl.metrics.reference import Reference
from diffusion_pl.seeds import seed_of

REFERENCE_BATCH = 250  # real images an extractor sees at a time


class Sampler(Protocol):
    """Noise to images; see samplers/."""

    def __call__(
        self, denoise: Denoise, noise: Tensor, randn_like: Callable[[Tensor], Tensor]
    ) -> Tensor: ...


class Metric(Protocol):
    """A torchmetrics.Metric over features whose result is a dictionary of named numbers."""

    def update(self, features: Features) -> None: ...

    def compute(self) -> Mapping[str, float]: ...

    def to(self, device: torch.device | str) -> Any: ...


class MetricSettings(Protocol):
    """What YAML names: builds a metric for an extractor and a reference."""

    def build(self, extractor: Extractor, reference: Reference) -> Metric: ...


@dataclass(frozen=True)
class Evaluation:
    """What the `evaluation` node of an experiment says.

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

    def __post_init__(self) -> None:
        check_interval(self.guidance_interval)
        for key in ("every", "count", "batch_size", "grid"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1 (got {getattr(self, key)})")


@dataclass(frozen=True)
class Drawing:
    """How images are drawn from a trained denoiser.

    Args:
        denoiser: D.
        sampler: the algorithm with its levels.
        shape: (C, H, W) of an image.
        classes: classes of a conditional model, 0 for none.
        seed: of noise and labels.
        guidance: weight of the guidance, 1 for none.
        guidance_interval: noise levels (low, high] that are guided.
        guide: the weaker model of autoguidance; None for the model itself without its label.
        label: the class of every image, or None for a class drawn for each.
        precision: torch dtype the network computes in under autocast, None for float32.

    Raises:
        ValueError: a label that is not one of the model's classes; guidance without classes or
            guide; a guide of other images or classes.
    """

    denoiser: Denoiser
    sampler: Sampler
    shape: tuple[int, int, int]
    classes: int = 0
    seed: int = 0
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = EVERYWHERE
    guide: Guide | None = None
    label: int | None = None
    precision: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.label is not None and not 0 <= self.label < self.classes:
            known = f"0 to {self.classes - 1}" if self.classes else "none: it is unconditional"
            raise ValueError(f"label {self.label} is not one of the model's classes ({known})")
        check_interval(self.guidance_interval)
        if self.guide is not None:
            self.guide.check(self.shape, self.classes, self.guidance)
        elif self.guidance != 1 and not self.classes:
            raise ValueError(
                "guidance needs a model with classes; this one is unconditional (a weaker run can "
                "guide it: --guide RUN)"
            )

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """The class of each image, int64 (n,), uniform from (seed, i); None without classes."""
        if not self.classes:
            return None
        if self.label is not None:
            return torch.full((len(indices),), self.label)
        return torch.tensor([seed_of(self.seed, "label", i) % self.classes for i in indices])

    @torch.inference_mode()
    def images(self, indices: Sequence[int]) -> tuple[Tensor, int]:
        """Draw the images with these indices.

        Returns:
            uint8 (n, C, H, W) on the denoiser's device, and the network's evaluations per image.
        """
        device = next(self.denoiser.parameters()).device
        # The first noise is drawn on the CPU, so that any hardware starts from the same state.
        source = ImageNoise(self.seed, indices, "latent")
        noise = source(torch.empty(len(indices), *self.shape)).to(device)
        labels = self.labels(indices)
        counted = Counted(self.denoiser)
        guide = None if self.guide is None else Counted(self.guide.denoiser.to(device))
        denoise = guided(
            counted,
            label=None if labels is None else labels.to(device),
            weight=self.guidance,
            interval=self.guidance_interval,
            guide=guide,
        )
        with torch.autocast(device.type, self.precision, enabled=self.precision is not None):
            drawn = self.sampler(denoise, noise, ImageNoise(self.seed, indices, "sampler", device))
        if not torch.isfinite(drawn).all():
            raise ValueError("the sampler gave images that are not finite; the weights are unfit")
        seen = counted.seen + (guide.seen if guide is not None else 0)
        return to_bytes(drawn), seen // len(indices)


class RealImages(Protocol):
    """A data set to compare with; see data/."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def resolution(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, indices: Tensor) -> Tensor: ...


def reference_of(
    images: RealImages, extractor: Extractor, folder: Path, device: torch.device
) -> Reference:
    """Statistics of all real images, computed once for their content and kept.

    Args:
        images: the data set.
        extractor: the features; moved to `device`.
        folder: where the statistics are kept.
        device: where to compute.
    """
    extractor.to(device)
    pieces = torch.arange(len(images)).split(REFERENCE_BATCH)
    return references.cached(
        folder,
        (images.read(piece).to(device) for piece in pieces),
        images.name,
        images.fingerprint,
        images.resolution,
        len(images),
        extractor,
    )


def batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Cut a sequence into pieces of at most `size`."""
    return (indices[first : first + size] for first in range(0, len(indices), size))


def rank_share(count: int, rank: int, world_size: int) -> range:
    """The images a rank draws: one contiguous piece each, none padded, none twice."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def evaluate(
    drawing: Drawing,
    settings: Evaluation,
    extractor: Extractor,
    reference: Reference,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], Tensor]:
    """Draw `settings.count` images and measure them.

    On several ranks every rank calls it with its own number; metrics add up over the ranks inside
    torchmetrics, and every rank gets the same rows.

    Args:
        drawing: how images are drawn.
        settings: how many, and which metrics.
        extractor: the features, one pass for all metrics.
        reference: statistics of the real images.
        progress: called with (images drawn, images to draw) on this rank.

    Returns:
        One row a number, `{"name": "fd@1000/<reference>/<extractor>", "value", ...}`, and the first
        images of this rank, uint8 (up to settings.grid, C, H, W), for a grid.

    Raises:
        ValueError: the reference was made with another extractor or resolution.
    """
    reference.check(extractor, drawing.shape[1])
    device = next(drawing.denoiser.parameters()).device
    extractor.to(device)
    metrics = [metric.build(extractor, reference).to(device) for metric in settings.metrics]
    share = rank_share(settings.count, rank, world_size)
    shown: list[Tensor] = []
    started = time.monotonic()
    evaluations = 0
    for indices in batches(share, settings.batch_size):
        images, evaluations = drawing.images(indices)
        if sum(map(len, shown)) < settings.grid:
            shown.append(images.cpu())
        if metrics:
            with torch.inference_mode():
                features = extractor(images)
            for metric in metrics:
                metric.update(features)
        if progress is not None:
            progress(indices[-1] + 1 - share.start, len(share))
    values = {name: value for metric in metrics for name, value in metric.compute().items()}
    interval = drawing.guidance_interval
    common = {
        "n": settings.count,
        "reference": reference.name,
        "fingerprint": reference.fingerprint,
        "extractor": f"{extractor.name}-{extractor.digest}",
        "resize": extractor.resize,
        "evaluations": evaluations,
        "seed": settings.seed,
        "guidance": drawing.guidance,
        "guidance_interval": None if interval == EVERYWHERE else list(interval),
        "guide": None if drawing.guide is None else drawing.guide.name,
        "seconds": round(time.monotonic() - started, 2),
    }
    suffix = f"@{settings.count}/{reference.name}/{extractor.name}"
    rows = [{"name": f"{name}{suffix}", "value": value, **common} for name, value in values.items()]
    return rows, torch.cat(shown)[: settings.grid]
