"""Mean and covariance from sums in float64 that batches and ranks add up, in any order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ROWS = 1024  # rows that one product takes: five times faster than a product for each batch of 64


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of features.

    Args:
        mean: float64 (D,).
        covariance: float64 (D, D), symmetric, unbiased.
        count: N, images they were estimated from; 0 where a published file does not say.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @property
    def rank(self) -> int:
        """The covariance's rank at most: D, or N - 1."""
        dimension = len(self.mean)
        return min(dimension, self.count - 1) if self.count else dimension

    @cached_property
    def factor(self) -> Tensor:
        """F with F F^T = S, float64 (D, r), r the rank.

        Beyond r eigenvalues are rounding errors, whose square roots (1e-8 for 1e-16) would add up.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors[:, -self.rank :] * values[-self.rank :].clamp_min(0).sqrt()

    @cached_property
    def total(self) -> float:
        """tr(S), the total variance."""
        return torch.trace(self.covariance).item()


class Rows:
    """Batches that wait until they are enough rows for one product of matrices."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._waiting = 0

    def add(self, batch: Tensor) -> Tensor | None:
        """Take a batch, (B, D); give all that waited once there are `ROWS`."""
        self._batches.append(batch)
        self._waiting += len(batch)
        return self.rest() if self._waiting >= ROWS else None

    def rest(self) -> Tensor | None:
        """Give what still waits; None for nothing."""
        if not self._batches:
            return None
        rows = torch.cat(self._batches)
        self.clear()
        return rows

    def clear(self) -> None:
        """Forget what waits."""
        self._batches, self._waiting = [], 0


def add_(first: Tensor, second: Tensor, values: Tensor, shift: Tensor) -> None:
    """Add a batch to the sums about a fixed point, in place.

    Args:
        first: sum of x - shift, float64 (D,).
        second: sum of (x - shift)(x - shift)^T, float64 (D, D).
        values: x, (B, D), floating point.
        shift: (D,), near the mean: the covariance is the difference of second moment and squared
            mean, and loses the digits that the two have in common.
    """
    centred = values.to(torch.float64, copy=True).sub_(shift.to(values.device, torch.float64))
    first += centred.sum(dim=0)
    second.addmm_(centred.T, centred)


def moments(first: Tensor, second: Tensor, count: int, shift: Tensor) -> Moments:
    """Mean and unbiased covariance, (second - first first^T / N) / (N - 1), on the CPU.

    There the eigenvalues do not depend on the device that sampled.

    Args:
        first: as `add_` leaves it, added over the batches and ranks.
        second: likewise.
        count: N, at least 2.
        shift: the fixed point.
    """
    first, shift = first.cpu(), shift.cpu()
    # One copy of the sums, and all the rest in place: a matrix of Inception's features is 32 MiB.
    covariance = second.cpu().clone().addr_(first, first, alpha=-1 / count).div_(count - 1)
    return Moments(shift.to(torch.float64) + first / count, covariance, count)
