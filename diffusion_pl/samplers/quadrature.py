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

import torch

Rule = Sequence[tuple[float, float]]


def gauss_legendre(count: int = 8) -> Rule:
    """Gauss' nodes and weights on [0, 1], exact for polynomials below degree 2 count.

    The nodes are the eigenvalues of the symmetric tridiagonal matrix of the Legendre recurrence,
    the weights the squares of its eigenvectors' first entries (Golub & Welsch 1969). Eight nodes
    are exact to rounding for every density here at steps below h = 3 in ln sigma.
    """
    k = torch.arange(1, count, dtype=torch.float64)
    beside = k / torch.sqrt(4 * k.square() - 1)
    nodes, vectors = torch.linalg.eigh(beside.diag(1) + beside.diag(-1))
    return list(zip(((1 + nodes) / 2).tolist(), vectors[0].square().tolist(), strict=True))


def weights(
    nodes: Sequence[float],
    density: Callable[[float], float],
    start: float,
    end: float,
    rule: Rule,
) -> list[float]:
    """The weight of the value at each node, integrated from start to end.

    Args:
        nodes: where values are known, all different; k nodes are exact for polynomials below k.
        density: what the polynomial is multiplied by under the integral.
        start: of the integral; nodes may lie outside of it.
        end: of the integral, below start too.
        rule: quadrature on [0, 1].
    """
    total = [0.0] * len(nodes)
    for place, share in rule:
        q = start + place * (end - start)
        mass = share * (end - start) * density(q)
        for m, node in enumerate(nodes):
            basis = mass
            for n, other in enumerate(nodes):
                if n != m:
                    basis *= (q - other) / (node - other)
            total[m] += basis
    return total


def exponential_weights(nodes: Sequence[float], length: float, rule: Rule) -> list[float]:
    """The weights of D in an exponential integrator, e^(-length) x + sum of w_m D_m.

    Args:
        nodes: where D is known, in shares of the step: 0 its beginning, 1 its end, past ones below.
        length: of the step, in the exponent; the weights add up to 1 - e^(-length).
        rule: quadrature on [0, 1].
    """

    def density(share: float) -> float:
        return length * math.exp(-length * (1 - share))

    return weights(nodes, density, 0.0, 1.0, rule)
