"""Density and coverage: generated features in balls around real ones.

    density  = 1 / (k N) sum over generated features of the number of real balls that contain it
    coverage = fraction of the real balls that contain a generated feature

Naeem et al. 2020, arXiv 2002.09797, Eqs. 3 and 4; k = 5. Balls are around real features only, so
that a generated outlier cannot cover the real ones, as in recall.
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


def density_coverage(real: Distinct, generated: Distinct, k: int) -> tuple[float, float]:
    """Density, at least 0 and about 1 for equal distributions, and coverage, in [0, 1].

    Balls are closed, as in recall.

    Args:
        real: M in all, more than k.
        generated: N in all.
        k: a ball's radius is the distance to the k-th neighbour.
    """
    inside, met = 0, torch.zeros(len(real.times), dtype=torch.bool)
    for first, block in held(generated, real, k):
        balls = block.long() @ real.times
        inside += int(balls @ generated.times[first : first + len(block)])
        met |= block.any(dim=0)
    density = inside / (k * int(generated.times.sum()))
    return density, int(real.times[met].sum()) / int(real.times.sum())


def _measure(real: Tensor, k: int, generated: Tensor) -> dict[str, float]:
    drawn, known = distinct(generated, real)
    density, coverage = density_coverage(known, drawn, k)
    return {"density": density, "coverage": coverage}


@dataclass(frozen=True)
class DensityCoverage:
    """Settings of density and coverage.

    Args:
        neighbours: k.
    """

    neighbours: int = 5

    wants_features = True

    def numbers(self, extractor: Extractor) -> tuple[str, ...]:
        """Names of the values."""
        return ("density", "coverage")

    def check_count(self, generated: int, real: int | None = None) -> None:
        """Refuse too few real images; one generated image is enough."""
        if self.neighbours < 1 or (real is not None and real <= self.neighbours):
            raise UserError(
                f"density and coverage: neighbour {self.neighbours} needs more real images "
                f"(got {real})"
            )

    def build(self, extractor: Extractor, reference: Reference | None, count: int) -> Kept:
        """The metric for `count` generated images.

        Raises:
            UserError: no reference with features of this extractor, or too few images.
        """
        real = real_features(reference, extractor, "density and coverage")
        self.check_count(count, len(real))
        from diffusion_pl.metrics.accumulated import Kept  # torchmetrics: 5 s of CPU

        return Kept("pooled", extractor.dimension, partial(_measure, real, self.neighbours))
