"""CMMD: squared maximum mean discrepancy with a Gaussian kernel on CLIP's unit embeddings.

    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)),  sigma = 10
    CMMD = 1000 ( mean_{i, j} k(x_i, x_j) + mean_{i, j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j) )

Jayasumana et al. 2024, arXiv 2401.09603, Eq. 2 and section 4, with its code's estimator: the biased
one of least variance (Gretton et al. 2012, Eq. 5), at least 0. The paper's embeddings are those of
CLIP ViT-L/14 at 336 px; over another extractor the number is called "mmd". Its code
(google-research/cmmd) resizes whole images to 336 px by JAX's antialiased bicubic filter;
torch-fidelity's CLIP, which embeds here, by TensorFlow 1's bilinear one. Rows say both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_pl.errors import UserError
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.reference import Reference, real_features

if TYPE_CHECKING:
    from diffusion_pl.metrics.accumulated import Kept

SIGMA, SCALE = 10.0, 1000.0
PUBLISHED = "clip-vit-l-14-336px"  # torch-fidelity's name
PUBLISHED_RESIZE = "antialiased bicubic to 336 px"  # another than the extractor's own
_ROWS = 1024  # of the matrix of all pairs, at a time


def discrepancy(one: Tensor, other: Tensor, *, sigma: float = SIGMA) -> float:
    """MMD^2 of two sets of features, which are brought to unit length.

    Args:
        one: (m, D), on a device that has float64.
        other: (n, D), on the same one.
        sigma: of the kernel.

    Returns:
        At least 0, up to rounding.
    """
    # Kernels of unit vectors differ from 1 by 0.02 at most; the sum of the three cancels.
    one, other = (F.normalize(each.double(), dim=1) for each in (one, other))

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        rows = [torch.expm1((part @ y.T - 1) / sigma**2).sum() for part in x.split(_ROWS)]
        return torch.stack(rows).sum() / (len(x) * len(y))

    within = mean_kernel(one, one) + mean_kernel(other, other)
    return (within - 2 * mean_kernel(one, other)).item()


def _measure(key: str, real: Tensor, generated: Tensor) -> dict[str, float]:
    return {key: SCALE * discrepancy(generated, real.to(generated.device))}


@dataclass(frozen=True)
class CMMD:
    """Settings: there are none."""

    wants_features = True

    def numbers(self, extractor: Extractor) -> tuple[str, ...]:
        """Name of the value: "cmmd" only for the published CLIP."""
        return ("cmmd" if extractor.name == PUBLISHED else "mmd",)

    def check_count(self, generated: int, real: int | None = None) -> None:
        """Refuse fewer than two images."""
        if generated < 2 or (real is not None and real < 2):
            raise UserError("CMMD: needs at least 2 images on either side")

    def build(self, extractor: Extractor, reference: Reference | None, count: int) -> Kept:
        """The metric for `count` generated images.

        Raises:
            UserError: no reference with features of this extractor, or too few images.
        """
        real = real_features(reference, extractor, "CMMD")
        self.check_count(count, len(real))
        from diffusion_pl.metrics.accumulated import Kept  # torchmetrics: 5 s of CPU

        [key] = self.numbers(extractor)
        metric = Kept("pooled", extractor.dimension, partial(_measure, key, real))
        published = {"published_resize": PUBLISHED_RESIZE} if key == "cmmd" else {}
        kernel = f"exp(-|x - y|^2 / {2 * SIGMA**2:g}) of unit features"
        metric.notes = {"kernel": kernel, **published}
        return metric
