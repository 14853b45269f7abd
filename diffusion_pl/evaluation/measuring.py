"""Evaluation: the features of the images are extracted once, for all metrics.

An extractor's last digits depend on its batch size, so it always gets tiles of a fixed size, and
ranks take whole tiles: the numbers depend neither on the batch size nor on the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion_pl import ranks
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.generator import batches
from diffusion_pl.evaluation.provenance import now, surroundings
from diffusion_pl.evaluation.settings import (
    Evaluation,
    Metric,
    MetricSettings,
    wants_captions,
)
from diffusion_pl.images import ImageDataset
from diffusion_pl.metrics import published
from diffusion_pl.metrics.features import TILE, Extractor, tile
from diffusion_pl.metrics.real_images import KEPT
from diffusion_pl.metrics.reference import Reference

Progress = Callable[[int, int], None]


class Interrupted(Exception):
    """The evaluation was stopped; it has no result."""


class GeneratedImages(Protocol):
    """Images to evaluate, sampled on demand or read from files."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""

    @property
    def device(self) -> torch.device:
        """The device of the images."""

    def images(self, indices: Sequence[int]) -> tuple[Tensor, int]:
        """uint8 (n, C, H, W) on the device, and the network's evaluations per image."""

    def captions(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        """What each image was asked to show; None where nothing was asked in words."""

    def about(self) -> Mapping[str, Any]:
        """What is recorded of the images with every number."""


def reference_of(
    images: ImageDataset,
    settings: Evaluation,
    extractor: Extractor,
    folder: Path,
    device: torch.device,
    progress: Progress | None = None,
    *,
    open_file: Callable[[Path, published.Measuring], Reference] = published.open_reference,
) -> Reference:
    """The reference: the file that the settings name, else the statistics of all real images.

    Args:
        images: the training data.
        settings: of the evaluation.
        extractor: the features; moved to `device`.
        folder: of cached statistics, named by content.
        device: to compute on.
        progress: called with (images done, images to do) on this rank.
        open_file: reads the file that the settings name.

    Raises:
        UserError: a file that is absent, no reference, or of another extractor.
    """
    measuring = published.Measuring(extractor, folder, settings.wants_features, device, progress)
    if settings.reference is not None:
        check_counts(settings, None)
        return open_file(Path(settings.reference), measuring)
    check_counts(settings, len(images))
    return measuring.of(images)


def check_counts(settings: Evaluation, real: int | None) -> None:
    """Refuse metrics that need more images, before any image is read.

    Args:
        settings: metrics and number of images.
        real: number of real images, None where it is not known.

    Raises:
        UserError: names the first such metric.
    """
    for metric in settings.metrics:
        metric.check_count(settings.count, None if real is None else min(real, KEPT))


def build(
    drawn: GeneratedImages, settings: Evaluation, extractor: Extractor, reference: Reference
) -> list[Metric]:
    """The metrics of one evaluation.

    Raises:
        UserError: a metric cannot be computed with these images, extractor, reference and count.
    """
    reference.check(extractor, drawn.shape[1])
    for metric in settings.metrics:
        check_captions(metric, drawn)
    return [
        metric.build(extractor, reference, settings.count).to(drawn.device)
        for metric in settings.metrics
    ]


def check_captions(metric: MetricSettings, drawn: GeneratedImages) -> None:
    """Refuse a metric that compares images with captions where there are none.

    Raises:
        UserError: names the metric.
    """
    if wants_captions(metric) and drawn.captions([0]) is None:
        raise UserError(
            f"{type(metric).__name__}: compares images with what they were asked to show, and "
            "these were not asked for in words; leave it out of the metrics"
        )


def evaluate(
    drawn: GeneratedImages,
    settings: Evaluation,
    extractor: Extractor,
    reference: Reference,
    *,
    first: int = 0,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[list[dict[str, Any]], Tensor]:
    """Evaluate `settings.count` images.

    On several ranks every rank calls it; metrics add up over the ranks inside torchmetrics, and
    every rank gets the same rows.

    Args:
        drawn: the images.
        settings: number of images and metrics.
        extractor: the features.
        reference: of the real images.
        first: index of the first image; disjoint blocks give independent numbers.
        progress: called with (images measured, images to measure) on this rank.
        stop: polled between tiles, equally often on all ranks, which must all get the same
            answer; if true, the evaluation ends.

    Returns:
        A row for each number, `{"name": "fd@1000/<reference>/<extractor>", "value", ...}`, with
        all it depends on, and the first images, uint8 (up to settings.grid, C, H, W), for a grid.

    Raises:
        UserError: the reference was made with another extractor or resolution; fewer images than
            a metric needs; features that are not finite.
        Interrupted: it was stopped.
    """
    started = time.monotonic()
    metrics = build(drawn, settings, extractor, reference)
    extractor.to(drawn.device)
    share = ranks.rank_range(settings.count, TILE)
    shown: list[Tensor] = [torch.empty(0, *drawn.shape, dtype=torch.uint8, device=drawn.device)]
    if progress is not None:  # the first tile of a large network takes minutes
        progress(0, len(share))
    pieces = Pieces(drawn, range(first + share.start, first + share.stop), settings.batch_size)
    for piece in pieces:
        position = piece.start - first
        indices = range(piece.start, piece.start + len(piece.images))
        if position < settings.grid:
            shown.append(piece.images[: settings.grid - position])
        if metrics:
            with torch.inference_mode():
                features = tile(extractor, piece.images)._replace(
                    images=piece.images,
                    captions=drawn.captions(indices) if settings.wants_captions else None,
                )
            for metric in metrics:
                metric.update(features)
        if progress is not None:
            progress(position + len(piece.images) - share.start, len(share))
        _check_stop(stop)
    for _ in range(_tiles(ranks.rank_range(settings.count, TILE, of=0)) - _tiles(share)):
        _check_stop(stop)  # with the ranks that have a tile more
    common = {
        "n": settings.count,
        "first": first,
        "reference": reference.name,
        "reference_n": reference.count,
        "fingerprint": reference.fingerprint,
        "extractor": f"{extractor.name}-{extractor.digest}",
        "resize": extractor.resize,
        "features": extractor.precision,
        "features_error": extractor.error,
        **drawn.about(),
        "evaluations": pieces.evaluations,
        "ranks": ranks.world_size(),
        **surroundings(drawn.device),
    }
    suffix = f"@{settings.count}/{reference.name}/{extractor.name}"
    rows = [
        {"name": f"{name}{suffix}", "value": value, **metric.notes, **common}
        for metric in metrics
        for name, value in metric.compute().items()
    ]
    for row in rows:
        row["seconds"] = round(time.monotonic() - started, 2)
        row["time"] = now()
    return rows, ranks.gather(torch.cat(shown)).cpu()


def _tiles(share: range) -> int:
    return -(-len(share) // TILE)


def _check_stop(stop: Callable[[], bool] | None) -> None:
    if stop is not None and stop():
        raise Interrupted


class Tile(NamedTuple):
    """Consecutive images.

    Args:
        start: index of the first.
        images: uint8 (up to TILE, C, H, W).
    """

    start: int
    images: Tensor


class Pieces:
    """Images sampled in batches and returned in whole tiles.

    Args:
        drawn: the images.
        indices: of the images.
        batch_size: images sampled at a time.
    """

    def __init__(self, drawn: GeneratedImages, indices: range, batch_size: int) -> None:
        self.drawn, self.indices, self.batch_size = drawn, indices, batch_size
        self.evaluations = 0

    def __iter__(self) -> Iterator[Tile]:
        start, waiting = self.indices.start, []
        for piece in batches(self.indices, self.batch_size):
            images, self.evaluations = self.drawn.images(piece)
            waiting.append(images)
            while sum(map(len, waiting)) >= TILE:
                whole = torch.cat(waiting)
                yield Tile(start, whole[:TILE])
                start, waiting = start + TILE, [whole[TILE:]]
        if rest := sum(map(len, waiting)):
            assert start + rest == self.indices.stop
            yield Tile(start, torch.cat(waiting))
