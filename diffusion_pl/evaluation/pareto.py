"""The Pareto front: the points of lowest value at each cost."""

from __future__ import annotations

from collections.abc import Sequence


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the points that no other dominates (as cheap and as low, one of them strictly).

    Args:
        costs: of each point, such as evaluations or seconds.
        values: of each point, lower is better.

    Returns:
        Indices by rising cost.
    """
    best: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], values[i])):
        if not best or values[index] < values[best[-1]]:
            best.append(index)
    return best
