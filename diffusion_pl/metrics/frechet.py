"""Fréchet distance between Gaussians fitted to features; with the published Inception, FID.

    d^2 = | m1 - m2 |^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2))

Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, Eq. 6. Moments are float64 sums, so
neither batch size nor the number of devices moves the number.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.reference import Reference

if TYPE_CHECKING:
    from diffusion_pl.metrics.accumulated import FrechetDistance


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


@dataclass(frozen=True)
class Frechet:
    """Names the Fréchet distance in an experiment; the evaluation builds it."""

    def build(self, extractor: Extractor, reference: Reference | None) -> "FrechetDistance":
        """The metric of one evaluation.

        Raises:
            ValueError: no reference, or one made with another extractor.
        """
        if reference is None:
            raise ValueError("Fréchet distance: needs a reference; name one or compute it")
        reference.check(extractor, reference.resolution)
        from diffusion_pl.metrics.accumulated import FrechetDistance  # torchmetrics: 5 s of CPU

        return FrechetDistance(reference)
