"""Multistep on the rho grid: Zhang & Chen, Fast Sampling of Diffusion Models, arXiv:2204.13902.

The probability-flow ODE is dx/d sigma = eps, eps = (x - D(x; sigma)) / sigma (Karras 2022, Eq. 3).
As in the paper's tAB-DEIS, eps is the polynomial through its last values and is integrated exactly;
the variable of the polynomial is ours, q = sigma^(1/rho), in which EDM's levels are uniform:

    x_s = x + sum_m w_m eps_m ,   w_m = integral from q(sigma) to q(s) of l_m(q) rho q^(rho - 1) dq

with l_m the Lagrange polynomials through the last three q_m. eps is nearly constant at high levels,
where D is not, and smooth in q down to sigma = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.samplers.quadrature import gauss_legendre, weights


def deis(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    *,
    order: int = 3,
    rho: float = 7.0,
) -> Tensor:
    """Integrate from sigmas[0] to sigmas[-1] with one evaluation a step; order 3, deterministic.

    Args:
        denoise: D, called `denoise(x, sigma)`.
        x: the state at sigmas[0], float64 (B, C, H, W).
        sigmas: decreasing levels, float64 (N + 1,), all but the last > 0; any spacing.
        randn_like: not used; every integrator takes it.
        order: past values in the polynomial, at least 1 (Euler); the first steps have fewer.
        rho: of the variable q = sigma^(1/rho); 7 on EDM's levels.

    Returns:
        The state at sigmas[-1], float64; N evaluations.

    Raises:
        ValueError: order or rho below 1.
    """
    if order < 1 or rho < 1:
        raise ValueError(f"order and rho must be at least 1 (got {order} and {rho})")
    rule, on_device = gauss_legendre(), sigmas.to(x)
    slopes: list[Tensor] = []  # eps, the newest first
    nodes: list[float] = []
    for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        slope = (x - denoise(x, on_device[step])).div_(sigma)
        slopes = [slope, *slopes[: order - 1]]
        nodes = [sigma ** (1 / rho), *nodes[: order - 1]]
        end = following ** (1 / rho)
        shares = weights(nodes, lambda q: rho * q ** (rho - 1), nodes[0], end, rule)
        x = x.add(slope, alpha=shares[0])
        for past, share in zip(slopes[1:], shares[1:], strict=True):
            x.add_(past, alpha=share)
    return x
