"""Density and coverage: how often generated features fall into real ones' balls, and into how many.

    density  = 1 / (k N) sum_generated | real balls that hold it |
    coverage = share of the real balls that hold a generated feature

Naeem et al. 2020, arXiv 2002.09797, Eqs. 3 and 4; k = 5. Balls stand around real features only, so
one outlier among the generated ones cannot cover the real ones, as it does in recall.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.neighbours import blocks, centred, radii
from diffusion_pl.metrics.reference import Reference

if TYPE_CHECKING:
    from diffusion_pl.metrics.accumulated import Kept


def density_coverage(real: Tensor, generated: Tensor, k: int) -> tuple[float, float]:
    """Density, at least 0 and about 1 for equal distributions, and coverage, in [0, 1].

    Args:
        real: float64 (M, D), M more than k.
        generated: float64 (N, D).
        k: the neighbour that the balls reach to.
    """
    reach = radii(real, k)
    held, met = 0, torch.zeros(len(real), dtype=torch.bool)
    for block in blocks(generated, real):
        inside = block <= reach
        held += int(inside.sum())
        met |= inside.any(dim=0)
    return held / (k * len(generated)), met.double().mean().item()


def _measure(real: Tensor, k: int, generated: Tensor) -> dict[str, float]:
    generated, real = centred(generated, real)
    density, coverage = density_coverage(real, generated, k)
    return {"density": density, "coverage": coverage}


@dataclass(frozen=True)
class DensityCoverage:
    """Names density and coverage in an experiment; the evaluation builds them.

    Args:
        neighbours: k.
    """

    neighbours: int = 5

    wants_features = True

    def build(self, extractor: Extractor, reference: Reference | None, count: int) -> Kept:
        """The metric of one evaluation of `count` images.

        Raises:
            ValueError: no reference with features of the same extractor, or too few images.
        """
        if reference is None:
            raise ValueError("density and coverage: need a reference; name one or compute it")
        real = reference.images_for("density and coverage", extractor)
        if not 1 <= self.neighbours < len(real):
            raise ValueError(
                f"density and coverage: neighbour {self.neighbours} needs more real images "
                f"(got {len(real)})"
            )
        from diffusion_pl.metrics.accumulated import Kept  # torchmetrics: 5 s of CPU

        return Kept("pooled", extractor.dimension, partial(_measure, real, self.neighbours))
