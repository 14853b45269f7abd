"""Reference statistics: what real images look like to an extractor, with where they come from.

A distance is comparable only for the same images, resolution and extractor, so the file states all
three and a mismatch is an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_pl import ranks
from diffusion_pl.metrics.features import TILE, Extractor
from diffusion_pl.metrics.moments import Moments, Rows, add_, moments

# Features kept for the metrics that compare images with images: 400 MB of Inception's.
KEPT = 50_000


@dataclass(frozen=True, eq=False)
class Reference:
    """What is known of the features of real images.

    Args:
        name: of the images, as numbers against this reference are labelled.
        fingerprint: sha256 (hex) of the images; of the file for published statistics.
        resolution: side of the images, pixels; 0 where a published file does not say.
        count: N, images; 0 where a published file does not say.
        extractor: the extractor's name.
        digest: of its weights, 12 hex digits.
        resize: how it resized the images.
        mean: of the pooled features, float64 (D,).
        covariance: float64 (D, D), unbiased.
        precision: what the extractor computed in.
        spatial: moments of the spatial features, where the extractor has them.
        features: pooled features of KEPT images at most, float32 (M, D), where they were kept.
    """

    name: str
    fingerprint: str
    resolution: int
    count: int
    extractor: str
    digest: str
    resize: str
    mean: Tensor
    covariance: Tensor
    precision: str = "fp32"
    spatial: Moments | None = None
    features: Tensor | None = None

    @cached_property
    def pooled(self) -> Moments:
        """Moments of the pooled features, with their factor once it was needed."""
        return Moments(self.mean, self.covariance, self.count)

    def check(self, extractor: Extractor, resolution: int) -> None:
        """Refuse what these statistics cannot be compared with.

        Args:
            extractor: the one that will see the generated images.
            resolution: side of the generated images, pixels.

        Raises:
            ValueError: another resolution, extractor, weights, resize or precision.
        """
        for what, mine, theirs in (
            ("resolution", self.resolution or resolution, resolution),
            ("extractor", self.extractor, extractor.name),
            ("extractor digest", self.digest, extractor.digest),
            ("resize", self.resize, extractor.resize),
            ("precision", self.precision, extractor.precision),
            ("feature dimension", len(self.mean), extractor.dimension),
        ):
            if mine != theirs:
                raise ValueError(
                    f"reference {self.name}: {what} is {mine}, the evaluation has {theirs}; "
                    "compute the reference again for these settings"
                )

    def images_for(self, metric: str, extractor: Extractor) -> Tensor:
        """The features of single real images, (M, D), for a metric that compares with them.

        Raises:
            ValueError: made with another extractor, or only moments are there.
        """
        self.check(extractor, self.resolution)
        if self.features is None:
            raise ValueError(
                f"reference {self.name}: has moments only, and {metric} compares with single "
                "images; compute it from the data"
            )
        return self.features

    def save(self, path: Path) -> None:
        """Write a safetensors file whose metadata is the provenance; whole or not at all."""
        tensors = {"mean": self.mean.contiguous(), "covariance": self.covariance.contiguous()}
        if self.spatial is not None:
            tensors["spatial_mean"] = self.spatial.mean.contiguous()
            tensors["spatial_covariance"] = self.spatial.covariance.contiguous()
        if self.features is not None:
            tensors["features"] = self.features.contiguous()
        metadata = {
            field.name: str(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in ("mean", "covariance", "spatial", "features")
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            save_file(tensors, aside, metadata=metadata)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def load(path: Path) -> Reference:
    """Read a reference that `Reference.save` wrote.

    Raises:
        ValueError: the file is absent, damaged or no reference.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            count = int(metadata["count"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            spatial = None
            if "spatial_mean" in tensors:
                spatial = Moments(tensors["spatial_mean"], tensors["spatial_covariance"], count)
            return Reference(
                name=metadata["name"],
                fingerprint=metadata["fingerprint"],
                resolution=int(metadata["resolution"]),
                count=count,
                extractor=metadata["extractor"],
                digest=metadata["digest"],
                resize=metadata["resize"],
                mean=tensors["mean"],
                covariance=tensors["covariance"],
                precision=metadata.get("precision", "fp32"),
                spatial=spatial,
                features=tensors.get("features"),
            )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not reference statistics ({reason})") from error


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
        return moments(ranks.summed(self.first), ranks.summed(self.second), count, self.shift)


class RealImages(Protocol):
    """A data set to measure; see data/."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def resolution(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, indices: Tensor) -> Tensor: ...


def compute(
    images: RealImages,
    extractor: Extractor,
    *,
    keep: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Measure real images once; every rank does its share, and gets all of the result.

    Args:
        images: the data set.
        extractor: what looks at them; moved to `device`.
        keep: also the pooled features, of KEPT images spread evenly over the set at most.
        device: where to compute.
        progress: called after each piece with (images done, images to do) on this rank.

    Raises:
        ValueError: fewer than two images, or features that are not finite.
    """
    count = len(images)
    if count < 2:
        raise ValueError(f"reference {images.name}: needs at least 2 images (got {count})")
    extractor.to(device)
    # Every rank looks at these: moments are summed about one mean.
    about = extractor(images.read(torch.arange(min(TILE, count))).to(device))
    pooled = _Sums(about.pooled)
    spatial = None if about.spatial is None else _Sums(about.spatial)
    kept = [about.pooled[:0]]
    share = ranks.share(count, TILE)
    for start in range(share.start, share.stop, TILE):
        indices = torch.arange(start, min(start + TILE, share.stop))
        seen = extractor(images.read(indices).to(device))
        pooled.add(pooled.rows.add(seen.pooled))
        if spatial is not None and seen.spatial is not None:
            spatial.add(spatial.rows.add(seen.spatial))
        if keep:
            kept.append(seen.pooled[spread(indices, count)])
        if progress is not None:
            progress(int(indices[-1]) + 1 - share.start, len(share))
    measured = pooled.moments(count)
    if not torch.isfinite(measured.covariance).all():
        raise ValueError(
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
        features=ranks.gathered(torch.cat(kept)).float().cpu() if keep else None,
    )


def spread(indices: Tensor, count: int) -> Tensor:
    """Which of the images are among KEPT that lie evenly over all `count`, bool (n,)."""
    # i k / n passes a whole number, as it does at each image of no more than k.
    return (indices + 1) * KEPT // count > indices * KEPT // count


def cache_path(
    folder: Path,
    *,
    fingerprint: str,
    resolution: int,
    count: int,
    extractor: Extractor,
    keep: bool = False,
) -> Path:
    """Where the statistics of this content lie; a name says nothing of content and is no part."""
    key = [fingerprint, resolution, count, extractor.name, extractor.digest, extractor.resize]
    key += [extractor.precision, bool(extractor.spatial), keep]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return folder / f"reference-{digest[:32]}.safetensors"


def cached(
    folder: Path,
    images: RealImages,
    extractor: Extractor,
    *,
    keep: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Load the statistics of these images, or compute and keep them.

    Where a rank lacks the file, all compute together, and one of each machine writes it.

    Args:
        folder: the cache; made when needed.
        images: not read when the cache has the answer.
        extractor: what looks at them.
        keep: with the features of single images; see `compute`.
        device: where to compute.
        progress: see `compute`.

    Raises:
        ValueError: a damaged file in the cache, or as `compute`.
    """
    path = cache_path(
        folder,
        fingerprint=images.fingerprint,
        resolution=images.resolution,
        count=len(images),
        extractor=extractor,
        keep=keep,
    )
    if ranks.all_agree(path.exists(), device):
        # The same content may have been measured under another name.
        return dataclasses.replace(load(path), name=images.name)
    reference = compute(images, extractor, keep=keep, device=device, progress=progress)
    if ranks.leads_machine():
        reference.save(path)
    return reference
