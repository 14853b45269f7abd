"""Kernel distance: squared maximum mean discrepancy with a cubic kernel; KID with Inception.

    k(x, y) = (x . y / D + 1)^3
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Binkowski et al. 2018, arXiv 1801.01401, Eq. 4 and section 4: unbiased, so it may be negative. Mean
and standard deviation over subsets as in torch-fidelity 0.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.reference import Reference, real_features

if TYPE_CHECKING:
    from diffusion_pl.metrics.accumulated import Kept

LITERATURE = 1000  # images of a subset


def discrepancy(one: Tensor, other: Tensor) -> float:
    """MMD^2 of two sets of equal size.

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
    """MMD^2 of `subsets` random pairs of subsets with `size` features each."""
    # numpy's legacy generator, as in torch-fidelity.
    random = np.random.RandomState(seed)
    generated, real = generated.cpu().double(), real.double()
    values = []
    for _ in range(subsets):
        one = generated[random.choice(len(generated), size, replace=False)]
        other = real[random.choice(len(real), size, replace=False)]
        values.append(discrepancy(one, other))
    return values


def _measure(
    key: str, real: Tensor, drawn: Kernel, size: int, generated: Tensor
) -> dict[str, float]:
    values = torch.tensor(
        discrepancies(generated, real, subsets=drawn.subsets, size=size, seed=drawn.seed),
        dtype=torch.float64,
    )
    deviation = {f"{key}_std": values.std(correction=0).item()}
    varied = drawn.subsets > 1 and size < min(len(generated), len(real))
    return {key: values.mean().item(), **(deviation if varied else {})}


@dataclass(frozen=True)
class Kernel:
    """Settings of the kernel distance.

    The standard deviation is that of single subsets, not of their mean. It is omitted for a single
    subset, or subsets of all images of a side.

    Args:
        subsets: pairs of subsets; 100 in the literature.
        size: images of a subset. None: 1,000 as in the literature, or half of the smaller set if
            that is less.
        seed: of the subsets; torch-fidelity's by default.
    """

    subsets: int = 100
    size: int | None = None
    seed: int = 2020

    wants_features = True

    def size_for(self, generated: int, real: int) -> int:
        """Images of a subset."""
        return self.size or min(LITERATURE, min(generated, real) // 2)

    def numbers(self, extractor: Extractor) -> tuple[str, ...]:
        """Name of the mean: "kid" only for the published Inception."""
        return ("kid" if extractor.name == "inception" else "kd",)

    def check_count(self, generated: int, real: int | None = None) -> None:
        """Refuse too few images for the subsets."""
        if self.subsets < 1 or (self.size is not None and self.size < 2):
            raise UserError("kernel distance: needs a subset, and two images in it")
        fewest = generated if real is None else min(generated, real)
        counts = f"(got {generated} generated{'' if real is None else f', {real} real'})"
        if self.size is not None and fewest < self.size:
            raise UserError(
                f"kernel distance: subsets of {self.size} need as many images {counts}; lower its "
                "size, or leave it out"
            )
        if self.size is None and fewest < 4:
            raise UserError(f"kernel distance: needs at least 4 images on either side {counts}")

    def build(self, extractor: Extractor, reference: Reference | None, count: int) -> Kept:
        """The metric for `count` generated images.

        Raises:
            UserError: no reference with features of this extractor, or too few images.
        """
        real = real_features(reference, extractor, "kernel distance")
        self.check_count(count, len(real))
        from diffusion_pl.metrics.accumulated import Kept  # torchmetrics: 5 s of CPU

        [key] = self.numbers(extractor)
        size = self.size_for(count, len(real))
        metric = Kept("pooled", extractor.dimension, partial(_measure, key, real, self, size))
        metric.notes = {"subsets": self.subsets, "subset_size": size}
        return metric
