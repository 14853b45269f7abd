"""Statistics of real images, computed by all ranks and cached by content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffusion_pl import ranks
from diffusion_pl.errors import UserError
from diffusion_pl.images import ImageDataset
from diffusion_pl.metrics.features import TILE, Extractor, tile
from diffusion_pl.metrics.moments import Moments, Rows, add_, moments
from diffusion_pl.metrics.reference import Reference, load

# Features kept for metrics that compare single images: 400 MB for Inception.
KEPT = 50_000


class _Sums:
    """Moment sums of one kind of features on this rank, about the mean of the first images."""

    def __init__(self, first_images: Tensor) -> None:
        self.shift = first_images.double().mean(dim=0)
        dimension = len(self.shift)
        self.first = torch.zeros_like(self.shift)
        self.second = self.shift.new_zeros(dimension, dimension)
        self.rows = Rows()

    def add(self, rows: Tensor | None) -> None:
        if rows is not None:
            add_(self.first, self.second, rows, self.shift)

    def moments(self, count: int) -> Moments:
        self.add(self.rows.rest())
        return moments(
            ranks.sum_over_ranks(self.first), ranks.sum_over_ranks(self.second), count, self.shift
        )


def compute(
    images: ImageDataset,
    extractor: Extractor,
    *,
    keep: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Statistics of real images, computed by all ranks together.

    Args:
        images: the data set.
        extractor: moved to `device`.
        keep: also keep pooled features, of at most KEPT images at even distances.
        device: for the extractor.
        progress: called with (images done, images to do) on this rank.

    Raises:
        UserError: fewer than two images, or non-finite features.
    """
    count = len(images)
    if count < 2:
        raise UserError(f"reference {images.name}: needs at least 2 images (got {count})")
    extractor.to(device)
    # On every rank, so that moments are summed about the same mean.
    about = tile(extractor, images.read(torch.arange(min(TILE, count))).to(device))
    pooled = _Sums(about.pooled)
    spatial = None if about.spatial is None else _Sums(about.spatial)
    kept = [about.pooled[:0]]
    share = ranks.rank_range(count, TILE)
    for start in range(share.start, share.stop, TILE):
        indices = torch.arange(start, min(start + TILE, share.stop))
        seen = tile(extractor, images.read(indices).to(device))
        pooled.add(pooled.rows.add(seen.pooled))
        if spatial is not None and seen.spatial is not None:
            spatial.add(spatial.rows.add(seen.spatial))
        if keep:
            kept.append(seen.pooled[evenly_kept(indices, count)])
        if progress is not None:
            progress(int(indices[-1]) + 1 - share.start, len(share))
    measured = pooled.moments(count)
    if not torch.isfinite(measured.covariance).all():
        raise UserError(
            f"reference {images.name}: the extractor {extractor.name} gave non-finite values"
        )
    return Reference(
        name=images.name,
        fingerprint=images.fingerprint,
        resolution=images.resolution,
        count=count,
        extractor=extractor.name,
        digest=extractor.digest,
        resize=extractor.resize,
        mean=measured.mean,
        covariance=measured.covariance,
        precision=extractor.precision,
        spatial=None if spatial is None else spatial.moments(count),
        features=ranks.gather(torch.cat(kept)).float().cpu() if keep else None,
    )


def evenly_kept(indices: Tensor, count: int) -> Tensor:
    """Which images are among KEPT at even distances over all `count`, bool (n,)."""
    # Those at which i KEPT / count passes a whole number: all of them where count <= KEPT.
    return (indices + 1) * KEPT // count > indices * KEPT // count


def path_of(folder: Path, images: ImageDataset, extractor: Extractor, *, keep: bool) -> Path:
    """Cache file of these images' statistics, by their content; their name plays no part."""
    key = [
        images.fingerprint, images.resolution, len(images), extractor.name, extractor.digest,
        extractor.resize, extractor.precision, bool(extractor.spatial), keep,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return folder / f"reference-{digest[:32]}.safetensors"


def cached(
    folder: Path,
    images: ImageDataset,
    extractor: Extractor,
    *,
    keep: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Load the statistics of these images, or compute and cache them.

    If any rank lacks the file, all compute, and one per machine writes it.

    Args:
        folder: of the cache; created if needed.
        images: not read if cached.
        extractor: see `compute`, also for the other arguments.

    Raises:
        UserError: a damaged file in the cache, or as `compute`.
    """
    path = path_of(folder, images, extractor, keep=keep)
    if ranks.all_agree(path.exists(), device):
        # The same content may have been cached under another name.
        return dataclasses.replace(load(path), name=images.name)
    reference = compute(images, extractor, keep=keep, device=device, progress=progress)
    if ranks.leads_machine():
        reference.save(path)
    return reference
