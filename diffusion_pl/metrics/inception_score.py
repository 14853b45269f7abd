"""Inception score: exp of the mean divergence of p(y|x) from p(y), over splits of the images.

    IS = exp( mean_x KL( p(y|x) || q(y) ) ) = exp( mean_x sum_y p log p - sum_y q log q ),
    q(y) = mean_x p(y|x)

Salimans et al. 2016, arXiv 1606.03498, section 4; splits, shuffling and standard deviation as in
torch-fidelity 0.4. With another classifier than the published Inception it is a classifier score.
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
from diffusion_pl.metrics.reference import Reference

if TYPE_CHECKING:
    from diffusion_pl.metrics.accumulated import Kept


def scores(logits: Tensor, splits: int, seed: int) -> Tensor:
    """The score of each split.

    Args:
        logits: (N, K), N at least `splits`, in the order of the images.
        splits: parts of nearly equal size.
        seed: of a shuffle, since generated images may be sorted by class.

    Returns:
        float64 (splits,), each between 1 and K.
    """
    # numpy's legacy generator, as in torch-fidelity.
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    logits = logits.cpu()[order].to(torch.float64)
    parts = []
    for split in range(splits):
        part = logits[split * len(logits) // splits : (split + 1) * len(logits) // splits]
        p, log_p = part.softmax(dim=1), part.log_softmax(dim=1)
        q = p.mean(dim=0)
        # xlogy is 0 for a class that no image of the split has, where q log q would be NaN.
        parts.append(((p * log_p).sum(dim=1).mean() - torch.xlogy(q, q).sum()).exp())
    return torch.stack(parts)


def _measure(key: str, splits: int, seed: int, logits: Tensor) -> dict[str, float]:
    values = scores(logits, splits, seed)
    return {key: values.mean().item(), f"{key}_std": values.std(correction=0).item()}


@dataclass(frozen=True)
class InceptionScore:
    """Settings of the score.

    Args:
        splits: 10 in every paper.
        seed: of the shuffle; torch-fidelity's by default.
    """

    splits: int = 10
    seed: int = 2020

    wants_features = False

    def numbers(self, extractor: Extractor) -> tuple[str, ...]:
        """Name of the mean: "is" only for the published Inception, else "cs"."""
        return ("is" if extractor.name == "inception" else "cs",)

    def check_count(self, generated: int, real: int | None = None) -> None:
        """Refuse fewer images than splits."""
        if self.splits < 1:
            raise UserError(f"classifier score: splits must be at least 1 (got {self.splits})")
        if generated < self.splits:
            raise UserError(
                f"classifier score: needs an image in each of {self.splits} splits "
                f"(got {generated})"
            )

    def build(self, extractor: Extractor, reference: Reference | None, count: int) -> Kept:
        """The metric for `count` images, which keeps all logits; no reference is needed.

        Raises:
            UserError: no split, fewer images than splits, or an extractor without classes.
        """
        self.check_count(count)
        if not extractor.classes:
            raise UserError(
                f"classifier score: {extractor.name} knows no classes; leave it out of the "
                "metrics, or take features that know some, such as shapes"
            )
        [key] = self.numbers(extractor)
        from diffusion_pl.metrics.accumulated import Kept  # torchmetrics: 5 s of CPU

        formula = partial(_measure, key, self.splits, self.seed)
        return Kept("logits", extractor.classes, formula)
