"""The metrics as torchmetrics: states that add up over batches and devices.

Apart from the formulas, so that binding an experiment's YAML does not import torchmetrics.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.frechet import distance, factor
from diffusion_pl.metrics.inception_score import scores
from diffusion_pl.metrics.moments import covariance, sums
from diffusion_pl.metrics.reference import Reference


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


class ClassifierScore(Metric):
    """Mean and population standard deviation of the score over the splits.

    All logits are kept, since which split an image is in depends on how many follow. The images'
    order decides the splits: ranks give the number of a single device if each takes a block of
    consecutive images.

    Args:
        key: what the score is called, "is" or "cs".
        splits: at least 1.
        seed: of the shuffle.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    logits: list[Tensor]

    def __init__(self, key: str, splits: int, seed: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._key, self._splits, self._seed = key, splits, seed
        self.add_state("logits", [], dist_reduce_fx="cat")

    def update(self, features: Features) -> None:
        """Add a batch, logits (B, K)."""
        self.logits.append(features.logits)

    def compute(self) -> dict[str, float]:
        """{"is": mean, "is_std": spread}, or "cs" and "cs_std".

        Raises:
            ValueError: fewer images than splits, or logits that are not finite.
        """
        logits = dim_zero_cat(self.logits)
        if len(logits) < self._splits:
            raise ValueError(
                f"classifier score: needs an image in each of {self._splits} splits "
                f"(got {len(logits)})"
            )
        if not torch.isfinite(logits).all():
            raise ValueError(
                "classifier score: some logits are not finite; look at the generated images"
            )
        values = scores(logits, self._splits, self._seed)
        spread = values.std(correction=0)
        return {self._key: values.mean().item(), f"{self._key}_std": spread.item()}
