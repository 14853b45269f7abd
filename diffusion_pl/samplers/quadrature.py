"""The weights of multistep rules: polynomials through past values, integrated exactly.

A rule that replaces an integrand by the polynomial through its values f_m at the nodes q_m is the
sum of w_m f_m with

    w_m = integral of l_m(q) density(q) dq ,   l_m(q) = prod_{n != m} (q - q_n) / (q_m - q_n)

by Gauss' quadrature in float64. In closed form the same weights are differences of nearly equal
numbers, which at 1,000 steps cost half of the digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

# Nodes and weights of Gauss-Legendre quadrature with 8 points on [-1, 1], of either sign
# (Abramowitz & Stegun, table 25.4): exact below degree 16, so for every parabola on a whole rho up
# to 13, and to rounding for the exponentials here at steps below 3 in ln sigma.
_HALF = (
    (0.18343464249564978, 0.36268378337836166),
    (0.525532409916329, 0.3137066458778869),
    (0.7966664774136267, 0.22238103445337443),
    (0.9602898564975362, 0.10122853629037706),
)
POINTS = tuple(((1 + sign * node) / 2, share / 2) for node, share in _HALF for sign in (-1, 1))


def weights(
    nodes: Sequence[float],
    density: Callable[[float], float],
    start: float,
    end: float,
) -> list[float]:
    """The weight of the value at each node, integrated from start to end.

    Args:
        nodes: where values are known, all different; k nodes are exact for polynomials below k.
        density: what the polynomial is multiplied by under the integral.
        start: of the integral; nodes may lie outside of it.
        end: of the integral, below start too.
    """
    total = [0.0] * len(nodes)
    for place, share in POINTS:
        q = start + place * (end - start)
        mass = share * (end - start) * density(q)
        for m, node in enumerate(nodes):
            basis = mass
            for n, other in enumerate(nodes):
                if n != m:
                    basis *= (q - other) / (node - other)
            total[m] += basis
    return total


def exponential_weights(nodes: Sequence[float], length: float) -> list[float]:
    """The weights of D in an exponential integrator, e^(-length) x + sum of w_m D_m.

    Args:
        nodes: where D is known, in shares of the step: 0 its beginning, 1 its end, past ones below.
        length: of the step, in the exponent; the weights add up to 1 - e^(-length).
    """

    def density(share: float) -> float:
        return length * math.exp(-length * (1 - share))

    return weights(nodes, density, 0.0, 1.0)
