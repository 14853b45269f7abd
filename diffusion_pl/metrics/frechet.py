"""Fréchet distance between Gaussians fitted to features; with the published Inception, FID.

    d^2 = | m1 - m2 |^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2))

Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, Eq. 6. Moments are float64 sums, so
neither batch size nor the number of devices moves the number.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from diffusion_pl.metrics.features import Extractor, Features
from diffusion_pl.metrics.moments import covariance, sums
from diffusion_pl.metrics.reference import Reference


def factor(covariance: Tensor, count: int) -> Tensor:
    """F with F F^T = S: the half of the distance that depends on the reference alone.

    Args:
        covariance: S, float64 (D, D), symmetric.
        count: images it was estimated from; its rank is at most count - 1.

    Returns:
        float64 (D, r), r = min(D, count - 1). Beyond r eigenvalues are rounding errors, whose
        square roots (1e-8 for 1e-16) would add up.
    """
    values, vectors = torch.linalg.eigh(covariance)
    rank = min(len(values), count - 1)
    return vectors[:, -rank:] * values[-rank:].clamp_min(0).sqrt()


def distance(
    difference: Tensor, covariance: Tensor, count: int, reference: Tensor, total: float
) -> float:
    """The squared Fréchet distance, the number that papers call FID.

    S1^(1/2) S2 S1^(1/2) and F^T S2 F have the same eigenvalues beside zeros, for any F F^T = S1,
    and the latter is symmetric: real eigenvalues, six times faster than a general square root.

    Args:
        difference: m2 - m1, float64 (D,).
        covariance: S2, float64 (D, D), symmetric.
        count: images S2 was estimated from.
        reference: F, float64 (D, r), from `factor`.
        total: tr(S1).

    Returns:
        At least 0.
    """
    product = reference.T @ covariance @ reference
    values = torch.linalg.eigvalsh(0.5 * (product + product.T))
    rank = min(len(values), count - 1)
    # The others are zero in exact arithmetic; see `factor`.
    root = values[-rank:].clamp_min(0).sqrt().sum()
    squared = difference.square().sum() + torch.trace(covariance) + total - 2 * root
    # Equal moments differ by rounding, in either direction.
    return max(0.0, squared.item())


class FrechetDistance(Metric):
    """Fréchet distance of the features seen so far to a reference.

    Args:
        reference: the statistics of real images; moments are summed about its mean.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    first: Tensor
    second: Tensor
    count: Tensor

    def __init__(self, reference: Reference, **settings: Any) -> None:
        super().__init__(**settings)
        self._reference = reference
        self._factor: Tensor | None = None
        dimension = len(reference.mean)
        for name, shape in (("first", (dimension,)), ("second", (dimension, dimension))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Features) -> None:
        """Add a batch, pooled (B, D)."""
        first, second = sums(features.pooled, self._reference.mean)
        self.first += first
        self.second += second
        self.count += len(features.pooled)

    def compute(self) -> dict[str, float]:
        """{"fid": ...} with the published Inception, {"fd": ...} with any other extractor.

        Raises:
            ValueError: fewer than two images, or features that are not finite.
        """
        count = int(self.count)
        if count < 2:
            raise ValueError(f"Fréchet distance: needs at least 2 images (got {count})")
        # Checked here and not in each update, where it would wait for the device.
        if not torch.isfinite(self.second).all():
            raise ValueError(
                "Fréchet distance: some features are not finite; look at the generated images"
            )
        # On the CPU, where the eigenvalues do not depend on the device that sampled.
        first, second = self.first.cpu(), self.second.cpu()
        if self._factor is None:
            self._factor = factor(self._reference.covariance, self._reference.count)
        value = distance(
            first / count,
            covariance(first, second, count),
            count,
            self._factor,
            torch.trace(self._reference.covariance).item(),
        )
        return {"fid" if self._reference.extractor == "inception" else "fd": value}


@dataclass(frozen=True)
class Frechet:
    """Names the Fréchet distance in an experiment; the evaluation builds it."""

    def build(self, extractor: Extractor, reference: Reference | None) -> FrechetDistance:
        """The metric of one evaluation.

        Raises:
            ValueError: no reference, or one made with another extractor.
        """
        if reference is None:
            raise ValueError("Fréchet distance: needs a reference; name one or compute it")
        reference.check(extractor, reference.resolution)
        return FrechetDistance(reference)
