"""Kernel distance: the squared maximum mean discrepancy under a cubic kernel; with Inception, KID.

    k(x, y) = (x . y / D + 1)^3
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Binkowski et al. 2018, arXiv 1801.01401, Eq. 4 and section 4: unbiased, so it may be negative, and
few images spread it without shifting it. Mean and spread over subsets as in torch-fidelity 0.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.reference import Reference

if TYPE_CHECKING:
    from diffusion_pl.metrics.accumulated import Kept


def discrepancy(one: Tensor, other: Tensor) -> float:
    """MMD^2 of as many features on either side.

    Args:
        one: (m, D), m at least 2.
        other: (m, D).
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def without_itself(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    within = without_itself(kernel(one, one)) + without_itself(kernel(other, other))
    return (within - 2 * kernel(one, other).mean()).item()


def discrepancies(
    generated: Tensor, real: Tensor, *, subsets: int, size: int, seed: int
) -> list[float]:
    """MMD^2 of each of `subsets` random pairs of `size` features."""
    # numpy's old generator, frozen for ever, is what torch-fidelity draws with.
    random = np.random.RandomState(seed)
    generated, real = generated.cpu().double(), real.double()
    values = []
    for _ in range(subsets):
        one = generated[random.choice(len(generated), size, replace=False)]
        other = real[random.choice(len(real), size, replace=False)]
        values.append(discrepancy(one, other))
    return values


def _measure(key: str, real: Tensor, drawn: Kernel, generated: Tensor) -> dict[str, float]:
    values = torch.tensor(
        discrepancies(generated, real, subsets=drawn.subsets, size=drawn.size, seed=drawn.seed),
        dtype=torch.float64,
    )
    return {key: values.mean().item(), f"{key}_std": values.std(correction=0).item()}


@dataclass(frozen=True)
class Kernel:
    """Names the kernel distance in an experiment; the evaluation builds it.

    Args:
        subsets: pairs of subsets; 100 in the literature.
        size: images of a subset; 1,000 in the literature, and at least as many must be there.
        seed: of the subsets; torch-fidelity's by default.
    """

    subsets: int = 100
    size: int = 1000
    seed: int = 2020

    wants_features = True

    def build(self, extractor: Extractor, reference: Reference | None, count: int) -> Kept:
        """The metric of one evaluation of `count` images.

        Raises:
            ValueError: no reference with features of the same extractor, or too few images.
        """
        if reference is None:
            raise ValueError("kernel distance: needs a reference; name one or compute it")
        real = reference.images_for("the kernel distance", extractor)
        if self.subsets < 1 or self.size < 2:
            raise ValueError("kernel distance: needs a subset, and two images in it")
        if min(count, len(real)) < self.size:
            raise ValueError(
                f"kernel distance: subsets of {self.size} need as many images "
                f"(got {count} generated, {len(real)} real); lower its size"
            )
        from diffusion_pl.metrics.accumulated import Kept  # torchmetrics: 5 s of CPU

        key = "kid" if extractor.name == "inception" else "kd"
        return Kept("pooled", extractor.dimension, partial(_measure, key, real, self))
