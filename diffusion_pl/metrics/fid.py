"""Fréchet distance between Gaussians fitted to features; FID with the published Inception.

    d^2 = | m1 - m2 |^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2))

Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, Eq. 6. With 7 x 17 x 17 spatial
activations of Inception instead of the pooled ones it is sFID (Nash et al. 2021, arXiv 2103.03841,
section 5.1). Moments are float64 sums, independent of batch size and number of devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.moments import Moments
from diffusion_pl.metrics.reference import Reference

if TYPE_CHECKING:
    from diffusion_pl.metrics.accumulated import Summed

# With fewer images the bias of the distance is estimated and reported.
ENOUGH = 10_000

# Numbers of disjoint pieces, for the distance as a function of the number of images.
PIECES = (1, 2, 4)


def distance(one: Moments, other: Moments) -> float:
    """The squared Fréchet distance, the number that papers call FID.

    S1^(1/2) S2 S1^(1/2) and F^T S2 F have the same nonzero eigenvalues, for any F F^T = S1, and the
    latter is symmetric: real eigenvalues, six times faster than a general square root.

    Args:
        one: of the reference, whose factor is cached.
        other: of the generated images, on the same device.

    Returns:
        At least 0.
    """
    product = one.factor.T @ other.covariance @ one.factor
    values = torch.linalg.eigvalsh(0.5 * (product + product.T))
    # The others are zero in exact arithmetic; see `Moments.factor`.
    root = values[-min(len(values), other.rank) :].clamp_min(0).sqrt().sum()
    squared = (other.mean - one.mean).square().sum() + other.total + one.total - 2 * root
    # Equal moments differ by rounding, in either direction.
    return max(0.0, squared.item())


def distance_to(features: Tensor, reference: Moments) -> float:
    """`distance` from features, without their covariance: cheap for few images.

    The trace of (F^T S2 F)^(1/2) is the sum of the singular values of X F / sqrt(N - 1), X being
    the features less their mean.

    Args:
        features: (N, D), N at least 2.
        reference: S1.
    """
    features = features.to(torch.float64)
    mean = features.mean(dim=0)
    centred = (features - mean) / (len(features) - 1) ** 0.5
    seen = centred @ reference.factor
    gram = seen @ seen.T if len(seen) < seen.shape[1] else seen.T @ seen
    # N features less their mean span N - 1 dimensions.
    values = torch.linalg.eigvalsh(gram)[-min(len(gram), len(seen) - 1) :]
    root = values.clamp_min(0).sqrt().sum()
    squared = (mean - reference.mean).square().sum() + centred.square().sum()
    return (squared + reference.total - 2 * root).item()


def expected_bias(features: Tensor, reference: Moments) -> float:
    """The bias of the distance for N images: b / N in d(n) = a + b / n.

    Chong and Forsyth 2020, arXiv 1911.07023, section 3. The line is fitted to the mean distances of
    disjoint pieces; with fewer images than features it is a rough estimate.

    Args:
        features: (N, D), N at least 8.
        reference: of the real images; its own bias is not included.
    """
    inverse, measured = [], []
    for pieces in PIECES:
        parts = features.tensor_split(pieces)
        measured.append(sum(distance_to(part, reference) for part in parts) / pieces)
        inverse.append(pieces / len(features))
    x, y = torch.tensor([inverse, measured], dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return slope.item() / len(features)


def _measure(
    key: str, reference: Moments, generated: Moments, features: Tensor | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """The distance, with notes on its bias."""
    for whose, total in (("generated", generated.total), ("real", reference.total)):
        # Copies of one image; the distance would still be a number.
        if total <= 1e-12 * max(generated.total, reference.total):
            raise UserError(f"Fréchet distance: all {whose} images look alike to the extractor")
    notes: dict[str, Any] = {}
    if features is not None and len(features) >= 2 * max(PIECES):
        notes["bias"] = expected_bias(features, reference)
    if generated.count <= len(generated.mean):
        notes["warning"] = (
            f"{generated.count} images for {len(generated.mean)} features: the covariance is "
            "singular, and the distance only ranks runs measured alike"
        )
    return {key: distance(reference, generated)}, notes


@dataclass(frozen=True)
class Frechet:
    """Settings of the Fréchet distance.

    Args:
        of: "pooled" features for FID, "spatial" ones for sFID.
    """

    of: Literal["pooled", "spatial"] = "pooled"

    wants_features = False

    def numbers(self, extractor: Extractor) -> tuple[str, ...]:
        """Name of the value: "fid" and "sfid" only for the published Inception."""
        return ("s" * (self.of == "spatial") + ("fid" if extractor.name == "inception" else "fd"),)

    def check_count(self, generated: int, real: int | None = None) -> None:
        """Refuse fewer than two images, which have no covariance."""
        if generated < 2:
            raise UserError(f"Fréchet distance: needs at least 2 images (got {generated})")

    def build(self, extractor: Extractor, reference: Reference | None, count: int) -> Summed:
        """The metric for `count` generated images.

        Raises:
            UserError: no reference, or one of another extractor or without these features; an
                extractor without such features; fewer than two images.
        """
        if reference is None:
            raise UserError("Fréchet distance: needs a reference; name one or compute it")
        reference.check(extractor, reference.resolution)
        if self.of == "spatial" and not extractor.spatial:
            raise UserError(f"Fréchet distance: {extractor.name} has no spatial features (sFID)")
        known = reference.pooled if self.of == "pooled" else reference.spatial
        if known is None:
            raise UserError(f"reference {reference.name}: has no moments of {self.of} features")
        self.check_count(count)
        from diffusion_pl.metrics.accumulated import Summed  # torchmetrics: 5 s of CPU

        [key] = self.numbers(extractor)
        return Summed(self.of, known.mean, partial(_measure, key, known), keep=count < ENOUGH)
