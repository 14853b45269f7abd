"""Improved precision and recall: the fraction of one set in balls around the other.

    precision: generated features within the k-th neighbour's distance of a real one
    recall:    real features within the k-th neighbour's distance of a generated one

Kynkäänniemi et al. 2019, arXiv 1904.06991, Eqs. 1 to 3; k = 3. Both fall with the number of balls,
so compare equal numbers of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.neighbours import Distinct, distinct, held
from diffusion_pl.metrics.reference import Reference, real_features

if TYPE_CHECKING:
    from diffusion_pl.metrics.accumulated import Kept


def covered(points: Distinct, balls: Distinct, k: int) -> float:
    """Fraction of N points that lie in a ball around one of M features.

    Args:
        points: N in all.
        balls: M in all, more than k.
        k: a ball's radius is the distance to the k-th neighbour.
    """
    inside = torch.cat([block.any(dim=1) for _, block in held(points, balls, k)])
    return int(points.times[inside].sum()) / int(points.times.sum())


def _measure(real: Tensor, k: int, generated: Tensor) -> dict[str, float]:
    drawn, known = distinct(generated, real)
    return {"precision": covered(drawn, known, k), "recall": covered(known, drawn, k)}


@dataclass(frozen=True)
class PrecisionRecall:
    """Settings of precision and recall.

    Args:
        neighbours: k.
    """

    neighbours: int = 3

    wants_features = True

    def numbers(self, extractor: Extractor) -> tuple[str, ...]:
        """Names of the values."""
        return ("precision", "recall")

    def check_count(self, generated: int, real: int | None = None) -> None:
        """Refuse too few images on either side."""
        fewest = generated if real is None else min(generated, real)
        if not 1 <= self.neighbours < fewest:
            counts = f"{generated} generated" + ("" if real is None else f", {real} real")
            raise UserError(
                f"precision and recall: neighbour {self.neighbours} needs more images "
                f"(got {counts})"
            )

    def build(self, extractor: Extractor, reference: Reference | None, count: int) -> Kept:
        """The metric for `count` generated images.

        Raises:
            UserError: no reference with features of this extractor, or too few images.
        """
        real = real_features(reference, extractor, "precision and recall")
        self.check_count(count, len(real))
        from diffusion_pl.metrics.accumulated import Kept  # torchmetrics: 5 s of CPU

        return Kept("pooled", extractor.dimension, partial(_measure, real, self.neighbours))
