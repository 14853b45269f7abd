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

from diffusion_pl.errors import UserError
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.neighbours import Distinct, distinct, held
from diffusion_pl.metrics.reference import Reference, real_features

if TYPE_CHECKING:
    from diffusion_pl.metrics.accumulated import Kept


def density_coverage(real: Distinct, generated: Distinct, k: int) -> tuple[float, float]:
    """Density, at least 0 and about 1 for equal distributions, and coverage, in [0, 1].

    A ball is closed, as in recall: it holds what is as far away as the neighbour it reaches to.

    Args:
        real: M in all, more than k.
        generated: N in all.
        k: the neighbour that the balls reach to.
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
    """Names density and coverage in an experiment; the evaluation builds them.

    Args:
        neighbours: k.
    """

    neighbours: int = 5

    wants_features = True

    def numbers(self, extractor: Extractor) -> tuple[str, ...]:
        """What it measures, by name."""
        return ("density", "coverage")

    def check_count(self, generated: int, real: int | None = None) -> None:
        """Refuse too few real images; one generated image is enough.

        Raises:
            UserError: as said.
        """
        if self.neighbours < 1 or (real is not None and real <= self.neighbours):
            raise UserError(
                f"density and coverage: neighbour {self.neighbours} needs more real images "
                f"(got {real})"
            )

    def build(self, extractor: Extractor, reference: Reference | None, count: int) -> Kept:
        """The metric of one evaluation of `count` images.

        Raises:
            UserError: no reference with features of the same extractor, or too few images.
        """
        real = real_features(reference, extractor, "density and coverage")
        self.check_count(count, len(real))
        from diffusion_pl.metrics.accumulated import Kept  # torchmetrics: 5 s of CPU

        return Kept("pooled", extractor.dimension, partial(_measure, real, self.neighbours))
