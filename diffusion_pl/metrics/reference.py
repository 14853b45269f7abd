"""Reference statistics: what real images look like to an extractor, with where they come from.

A distance is comparable only for the same images, resolution and extractor, so the file states all
three and a mismatch is an error.
"""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.moments import covariance, sums


@dataclass(frozen=True, eq=False)
class Reference:
    """Mean and covariance of pooled features of real images.

    Args:
        name: of the images, as numbers against this reference are labelled.
        fingerprint: sha256 (hex) of the images.
        resolution: side of the images, pixels.
        count: N, images.
        extractor: the extractor's name.
        digest: of its weights, 12 hex digits.
        resize: how it resized the images.
        mean: float64 (D,).
        covariance: float64 (D, D), unbiased.
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

    def check(self, extractor: Extractor, resolution: int) -> None:
        """Refuse what these statistics cannot be compared with.

        Args:
            extractor: the one that will see the generated images.
            resolution: side of the generated images, pixels.

        Raises:
            ValueError: another resolution, extractor, weights or resize.
        """
        for what, mine, theirs in (
            ("resolution", self.resolution, resolution),
            ("extractor", self.extractor, extractor.name),
            ("extractor digest", self.digest, extractor.digest),
            ("resize", self.resize, extractor.resize),
            ("feature dimension", len(self.mean), extractor.dimension),
        ):
            if mine != theirs:
                raise ValueError(
                    f"reference {self.name}: {what} is {mine}, the evaluation has {theirs}; "
                    "compute the reference again for these settings"
                )

    def save(self, path: Path) -> None:
        """Write a safetensors file whose metadata is the provenance; whole or not at all."""
        tensors = {"mean": self.mean.contiguous(), "covariance": self.covariance.contiguous()}
        metadata = {
            field.name: str(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in tensors
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
            return Reference(
                name=metadata["name"],
                fingerprint=metadata["fingerprint"],
                resolution=int(metadata["resolution"]),
                count=int(metadata["count"]),
                extractor=metadata["extractor"],
                digest=metadata["digest"],
                resize=metadata["resize"],
                mean=file.get_tensor("mean"),
                covariance=file.get_tensor("covariance"),
            )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not reference statistics ({reason})") from error


def compute(
    images: Iterable[Tensor],
    name: str,
    fingerprint: str,
    resolution: int,
    extractor: Extractor,
    *,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """Measure real images once; the batches' sizes do not matter.

    Args:
        images: uint8 batches (B, C, R, R), on the extractor's device.
        name: of the images.
        fingerprint: sha256 (hex) of the images.
        resolution: R, pixels.
        extractor: what looks at them.
        progress: called after each batch with the number of images done.

    Raises:
        ValueError: images of another resolution, fewer than two, or features that are not finite.
    """
    shift = first = second = torch.empty(0)
    count = 0
    for batch in images:
        if batch.shape[2:] != (resolution, resolution):
            got = " x ".join(str(side) for side in batch.shape[2:])
            raise ValueError(f"reference {name}: images must be {resolution} px square (got {got})")
        pooled = extractor(batch).pooled.to(torch.float64)
        if count == 0:
            shift = pooled.mean(dim=0)
            first, second = torch.zeros_like(shift), shift.new_zeros(2 * (len(shift),))
        added = sums(pooled, shift)
        first, second = first + added[0], second + added[1]
        count += len(batch)
        if progress is not None:
            progress(count)
    if count < 2:
        raise ValueError(f"reference {name}: a covariance needs at least 2 images (got {count})")
    if not torch.isfinite(second).all():
        raise ValueError(f"reference {name}: the extractor {extractor.name} gave non-finite values")
    return Reference(
        name=name,
        fingerprint=fingerprint,
        resolution=resolution,
        count=count,
        extractor=extractor.name,
        digest=extractor.digest,
        resize=extractor.resize,
        mean=(shift + first / count).cpu(),
        covariance=covariance(first, second, count).cpu(),
    )


def cache_path(
    folder: Path, *, fingerprint: str, resolution: int, count: int, extractor: Extractor
) -> Path:
    """Where the statistics of this content lie; a name says nothing of content and is no part."""
    key = [fingerprint, resolution, count, extractor.name, extractor.digest, extractor.resize]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return folder / f"reference-{digest[:32]}.safetensors"


def cached(
    folder: Path,
    images: Iterable[Tensor],
    name: str,
    fingerprint: str,
    resolution: int,
    count: int,
    extractor: Extractor,
    *,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """Load the statistics of these images, or compute and keep them.

    Args:
        folder: the cache; made when needed.
        images: see `compute`; not touched when the cache has the answer.
        name: of the images.
        fingerprint: sha256 (hex) of the images.
        resolution: pixels.
        count: images that `images` will give.
        extractor: what looks at them.
        progress: see `compute`.

    Raises:
        ValueError: a damaged file in the cache, another number of images, or as `compute`.
    """
    path = cache_path(
        folder, fingerprint=fingerprint, resolution=resolution, count=count, extractor=extractor
    )
    if path.exists():
        # The same content may have been measured under another name.
        return dataclasses.replace(load(path), name=name)
    reference = compute(images, name, fingerprint, resolution, extractor, progress=progress)
    if reference.count != count:
        raise ValueError(f"reference {name}: {count} images announced, {reference.count} came")
    reference.save(path)
    return reference
