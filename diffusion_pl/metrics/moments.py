"""Mean and covariance from float64 sums over batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ROWS = 1024  # of one matrix product: five times faster than a product for each batch of 64


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of features.

    Args:
        mean: float64 (D,).
        covariance: float64 (D, D), symmetric, unbiased.
        count: N, number of images; 0 if a published file does not state it.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @property
    def rank(self) -> int:
        """Largest possible rank of the covariance: D, or N - 1."""
        dimension = len(self.mean)
        return min(dimension, self.count - 1) if self.count else dimension

    @cached_property
    def factor(self) -> Tensor:
        """F with F F^T = S, float64 (D, r), r the rank.

        Further eigenvalues are rounding errors, whose square roots (1e-8 for 1e-16) would add up.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors[:, -self.rank :] * values[-self.rank :].clamp_min(0).sqrt()

    @cached_property
    def total(self) -> float:
        """tr(S), the total variance."""
        return torch.trace(self.covariance).item()


class Rows:
    """Buffers batches until they have enough rows for one matrix product."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._waiting = 0

    def add(self, batch: Tensor) -> Tensor | None:
        """Add a batch, (B, D); returns the buffer once it has `ROWS` rows."""
        self._batches.append(batch)
        self._waiting += len(batch)
        return self.rest() if self._waiting >= ROWS else None

    def rest(self) -> Tensor | None:
        """Return and clear the buffer; None if empty."""
        if not self._batches:
            return None
        rows = torch.cat(self._batches)
        self.clear()
        return rows

    def clear(self) -> None:
        self._batches, self._waiting = [], 0


def add_(first: Tensor, second: Tensor, values: Tensor, shift: Tensor) -> None:
    """Add a batch to the sums about a fixed point, in place.

    Args:
        first: sum of x - shift, float64 (D,).
        second: sum of (x - shift)(x - shift)^T, float64 (D, D).
        values: x, (B, D), floating point.
        shift: (D,), near the mean, since the covariance is the difference of second moment and
            squared mean, and would lose digits to cancellation.
    """
    centred = values.to(torch.float64, copy=True).sub_(shift.to(values.device, torch.float64))
    first += centred.sum(dim=0)
    second.addmm_(centred.T, centred)


def moments(first: Tensor, second: Tensor, count: int, shift: Tensor) -> Moments:
    """Mean and unbiased covariance, (second - first first^T / N) / (N - 1), on the CPU.

    There the eigenvalues do not depend on the device that was used for sampling.

    Args:
        first: from `add_`, summed over batches and ranks.
        second: likewise.
        count: N, at least 2.
        shift: as for `add_`.
    """
    first, shift = first.cpu(), shift.cpu()
    # One copy of the sums, and all the rest in place: a matrix of Inception's features is 32 MiB.
    covariance = second.cpu().clone().addr_(first, first, alpha=-1 / count).div_(count - 1)
    return Moments(shift.to(torch.float64) + first / count, covariance, count)
