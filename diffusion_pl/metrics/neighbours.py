"""Balls around features that reach to their k-th neighbour, without a full matrix of distances."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 1000  # a block of distances: 80 MB of float64 against 10,000 features


def blocks(one: Tensor, other: Tensor) -> Iterator[Tensor]:
    """Squared distances of `one` to `other`, some rows at a time.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x . y in float64, where what cancels leaves digits enough.

    Args:
        one: float64 (N, D).
        other: float64 (M, D).

    Yields:
        float64 (up to ROWS, M), at least 0.
    """
    lengths = other.square().sum(dim=1)
    for rows in one.split(ROWS):
        squared = torch.addmm(lengths, rows, other.T, alpha=-2)
        squared += rows.square().sum(dim=1, keepdim=True)
        yield squared.clamp_(min=0)


def radii(features: Tensor, k: int) -> Tensor:
    """Squared distance of each to its k-th nearest other.

    Args:
        features: float64 (N, D), N more than k.
        k: at least 1.

    Returns:
        float64 (N,).
    """
    # The nearest of all is the feature itself.
    return torch.cat([block.kthvalue(k + 1).values for block in blocks(features, features)])


def centred(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 on the CPU about their common mean: distances stay, lengths shrink."""
    one, other = one.cpu().double(), other.cpu().double()
    middle = (one.mean(dim=0) + other.mean(dim=0)) / 2
    return one - middle, other - middle
