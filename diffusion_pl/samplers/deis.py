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

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.errors import UserError
from diffusion_pl.samplers.quadrature import weights
from diffusion_pl.samplers.sampler import steps_along


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
        denoise, x, sigmas, randn_like: as for every `Integrator`.
        order: past values in the polynomial, at least 1 (Euler); the first steps have fewer.
        rho: of the variable q = sigma^(1/rho); 7 on EDM's levels.

    Raises:
        UserError: order or rho below 1.
    """
    if order < 1 or rho < 1:
        raise UserError(f"order and rho must be at least 1 (got {order} and {rho})")
    x = x.clone()
    offsets = [torch.empty_like(x) for _ in range(order)]  # D - x = -sigma eps, the newest first
    levels: list[float] = []
    for sigma, sigma_next, level in steps_along(sigmas, x):
        offsets.insert(0, offsets.pop().copy_(denoise(x, level)).sub_(x))
        levels = [sigma, *levels[: order - 1]]
        nodes = [known ** (1 / rho) for known in levels]
        shares = weights(nodes, lambda q: rho * q ** (rho - 1), nodes[0], sigma_next ** (1 / rho))
        for offset, known, share in zip(offsets, levels, shares, strict=False):
            x.add_(offset, alpha=-share / known)
    return x
