"""Balls around features that reach to their k-th neighbour, without a full matrix of distances.

Whether a feature lies in a ball is decided exactly: a ball is closed (Kynkäänniemi 2019, Eq. 1:
"at most"), so a copy of the feature that gives it its radius lies in it, and images of which there
are several would otherwise be in or out by rounding, in another way in each order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS = 1000  # a block of distances: 80 MB of float64 against 10,000 features
PAIRS = 4096  # distances taken exactly at a time: 64 MB of Inception's features


@dataclass(frozen=True)
class Distinct:
    """Features without repetition.

    Args:
        features: float64 (n, D), as they are.
        shifted: the same about a common centre, where lengths are small.
        times: int64 (n,), how often each is there.
    """

    features: Tensor
    shifted: Tensor
    times: Tensor


def distinct(one: Tensor, other: Tensor) -> tuple[Distinct, Distinct]:
    """Both sets without repetition, in float64 on the CPU, about the middle of their means.

    Args:
        one: (N, D).
        other: (M, D).
    """
    one, other = one.cpu().double(), other.cpu().double()
    middle = (one.mean(dim=0) + other.mean(dim=0)) / 2
    found = []
    for features in (one, other):
        unique, times = torch.unique(features, dim=0, return_counts=True)
        found.append(Distinct(unique, unique - middle, times))
    return found[0], found[1]


def blocks(one: Distinct, other: Distinct) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Squared distances of `one` to `other`, some rows at a time, and how far off they may be.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x . y: fast, and good to some D units of the last place of
    (|x| + |y|)^2, each side's sums taken with the worst rounding (Higham 2002, section 3.1).

    Yields:
        Index of the first row; float64 (up to ROWS, n), and the bound of the error, of its shape.
    """
    lengths = other.shifted.square().sum(dim=1)
    unit = (one.shifted.shape[1] + 8) * torch.finfo(torch.float64).eps
    longest = lengths.sqrt()
    for first in range(0, len(one.shifted), ROWS):
        rows = one.shifted[first : first + ROWS]
        squares = rows.square().sum(dim=1, keepdim=True)
        squared = torch.addmm(lengths, rows, other.shifted.T, alpha=-2)
        squared += squares
        yield first, squared, unit * (squares.sqrt() + longest).square()


def exact(one: Distinct, other: Distinct, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances of single pairs, float64 (P,): the same for the same two features.

    The difference of two float32 numbers squares to the same in either direction, and numpy adds up
    each row alone and in one order.
    """
    found = [
        np.square(a.numpy() - b.numpy()).sum(axis=1)
        for a, b in (
            (one.features[i], other.features[j])
            for i, j in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True)
        )
    ]
    return torch.from_numpy(np.concatenate(found or [np.empty(0)]))


def radii(features: Distinct, k: int) -> Tensor:
    """Squared distance of each distinct feature to the k-th nearest other, copies counted singly.

    Args:
        features: more than k in all.
        k: at least 1.

    Returns:
        float64 (n,).
    """
    found = []
    count = min(k + 1, len(features.features))  # each is there at least once
    for first, squared, error in blocks(features, features):
        # No more than these can be among the nearest, whatever the rounding.
        reach = squared.kthvalue(count).values + 2 * error.amax(dim=1)
        rows, columns = (squared <= reach[:, None]).nonzero(as_tuple=True)
        distances = exact(features, features, rows + first, columns)
        order = np.lexsort((distances.numpy(), rows.numpy()))
        rows, columns, distances = rows[order], columns[order], distances[order]
        seen = features.times[columns].cumsum(dim=0)
        starts = torch.searchsorted(rows, torch.arange(len(squared)))
        before = torch.where(starts > 0, seen[starts - 1], 0)
        # The nearest of all is the feature itself, so the k-th other is the (k + 1)-th.
        found.append(distances[torch.searchsorted(seen, before + k + 1)])
    return torch.cat(found)


def held(points: Distinct, balls: Distinct, k: int) -> Iterator[tuple[int, Tensor]]:
    """Which balls hold which points, some rows at a time.

    Args:
        points: n of them.
        balls: m centres, more than k in all.
        k: the neighbour that the balls reach to.

    Yields:
        Index of the first point, and bool (up to ROWS, m).
    """
    reach = radii(balls, k)
    for first, squared, error in blocks(points, balls):
        inside = squared <= reach
        rows, columns = ((squared - reach).abs() <= error).nonzero(as_tuple=True)
        inside[rows, columns] = exact(points, balls, rows + first, columns) <= reach[columns]
        yield first, inside
