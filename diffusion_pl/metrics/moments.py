"""Mean and covariance from sums in float64 that batches and ranks add up, in any order."""

import torch
from torch import Tensor


def sums(values: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """First and second moment sums of a batch about a fixed point.

    Args:
        values: (B, D), floating point.
        shift: (D,), near the mean: the covariance is the difference of second moment and squared
            mean, and loses the digits that the two have in common.

    Returns:
        Sum of x - shift, float64 (D,), and sum of (x - shift)(x - shift)^T, float64 (D, D).
    """
    centred = values.to(torch.float64) - shift.to(values.device, torch.float64)
    return centred.sum(dim=0), centred.T @ centred


def covariance(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Unbiased covariance, (D, D): (second - first first^T / N) / (N - 1).

    Args:
        first: float64 (D,), as `sums` gives it, added over the batches.
        second: float64 (D, D), likewise.
        count: N, at least 2.
    """
    return (second - torch.outer(first, first) / count) / (count - 1)
