"""Reference statistics: features of real images, with their provenance.

Distances are comparable only for the same images, resolution and extractor, so the file states all
three and a mismatch is an error.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.io.files import aside, regular
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.moments import Moments
from diffusion_pl.names import plain


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of the features of real images.

    Args:
        name: of the images; part of the labels of values.
        fingerprint: sha256 (hex) of the images; of the file for published statistics.
        resolution: side of the images, pixels; 0 if a published file does not state it.
        count: N, images; 0 if a published file does not state it.
        extractor: name.
        digest: of its weights, 12 hex digits.
        resize: how it resized the images.
        mean: of the pooled features, float64 (D,).
        covariance: float64 (D, D), unbiased.
        precision: of the extractor.
        spatial: moments of the spatial features, or None.
        features: pooled features of some or all images, float32 (M, D), or None.
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
        """Moments of the pooled features; caches their factor."""
        return Moments(self.mean, self.covariance, self.count)

    def check(self, extractor: Extractor, resolution: int) -> None:
        """Check that generated images can be compared with these statistics.

        Args:
            extractor: for the generated images.
            resolution: side of the generated images, pixels.

        Raises:
            UserError: another resolution, extractor, weights, resize or precision.
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
                raise UserError(
                    f"reference {self.name}: {what} is {mine}, the evaluation has {theirs}; "
                    "compute the reference again for these settings"
                )

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically; the provenance is its metadata."""
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
        with aside(path) as part:
            save_file(tensors, part, metadata=metadata)


def real_features(reference: Reference | None, extractor: Extractor, metric: str) -> Tensor:
    """Features of single real images (M, D), for a metric that compares image with image.

    Raises:
        UserError: no reference, one of another extractor, or one with moments only.
    """
    if reference is None:
        raise UserError(f"{metric}: needs a reference; name one or compute it")
    reference.check(extractor, reference.resolution)
    if reference.features is None:
        raise UserError(
            f"{metric}: reference {reference.name} has moments only, and single images are "
            "compared; compute it from the data"
        )
    return reference.features


def load(path: Path) -> Reference:
    """Read a reference that `Reference.save` wrote.

    Raises:
        UserError: absent, damaged or not a reference.
    """
    try:
        with safe_open(regular(path), framework="pt") as file:
            metadata = file.metadata() or {}
            count = int(metadata["count"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            spatial = None
            if "spatial_mean" in tensors:
                spatial = Moments(tensors["spatial_mean"], tensors["spatial_covariance"], count)
            return Reference(
                name=plain(metadata["name"]),
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
        raise UserError(f"{path}: not reference statistics ({reason})") from error
