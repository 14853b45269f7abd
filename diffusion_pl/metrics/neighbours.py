"""k-nearest-neighbour balls around features, without a full distance matrix.

Membership is decided exactly: balls are closed (Kynkäänniemi 2019, Eq. 1: "at most"), so copies of
the feature at the radius lie inside, which rounding would otherwise decide by the order of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS = 1000  # a block of distances: 80 MB of float64 against 10,000 features
PAIRS = 4096  # a block of exact distances: 64 MB of Inception's features


@dataclass(frozen=True)
class Distinct:
    """Distinct features.

    Args:
        features: float64 (n, D).
        shifted: features about a common centre, with small norms.
        times: int64 (n,), multiplicity.
    """

    features: Tensor
    shifted: Tensor
    times: Tensor


def distinct(one: Tensor, other: Tensor) -> tuple[Distinct, Distinct]:
    """The distinct features of both sets, in float64 on the CPU, about the mean of their means.

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
    """Squared distances of `one` to `other` in blocks of rows, with a bound of their error.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x . y: fast, with an error of about D ulp of (|x| + |y|)^2 in the
    worst case (Higham 2002, section 3.1).

    Yields:
        Index of the first row; float64 (up to ROWS, n); error bound of the same shape.
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
    """Squared distances of single pairs, float64 (P,), reproducible for the same two features.

    Differences are symmetric, and numpy sums each row in one order.
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
    """Squared distance of each distinct feature to its k-th nearest other, copies included.

    Args:
        features: more than k in all.
        k: at least 1.

    Returns:
        float64 (n,).
    """
    found = []
    count = min(k + 1, len(features.features))  # multiplicities are at least 1
    for first, squared, error in blocks(features, features):
        # All candidates for the nearest, whatever the rounding.
        reach = squared.kthvalue(count).values + 2 * error.amax(dim=1)
        rows, columns = (squared <= reach[:, None]).nonzero(as_tuple=True)
        distances = exact(features, features, rows + first, columns)
        order = np.lexsort((distances.numpy(), rows.numpy()))
        rows, columns, distances = rows[order], columns[order], distances[order]
        seen = features.times[columns].cumsum(dim=0)
        starts = torch.searchsorted(rows, torch.arange(len(squared)))
        before = torch.where(starts > 0, seen[starts - 1], 0)
        # The nearest is the feature itself, so the k-th other is the (k + 1)-th.
        found.append(distances[torch.searchsorted(seen, before + k + 1)])
    return torch.cat(found)


def held(points: Distinct, balls: Distinct, k: int) -> Iterator[tuple[int, Tensor]]:
    """Which balls contain which points, in blocks of rows.

    Args:
        points: n distinct ones.
        balls: m distinct centres, more than k in all.
        k: a ball's radius is the distance to the k-th neighbour.

    Yields:
        Index of the first point, and bool (up to ROWS, m).
    """
    reach = radii(balls, k)
    for first, squared, error in blocks(points, balls):
        inside = squared <= reach
        rows, columns = ((squared - reach).abs() <= error).nonzero(as_tuple=True)
        inside[rows, columns] = exact(points, balls, rows + first, columns) <= reach[columns]
        yield first, inside
