"""The 5/3 wavelet transform of LeGall & Tabatabai 1988, by lifting, invertible.

Along each axis, with x extended by reflection at its ends:

    d[n] = x[2n + 1] - (x[2n] + x[2n + 2]) / 2        details
    s[n] = x[2n] + (d[n - 1] + d[n]) / 4              averages

The inverse takes the two steps back in turn. It is not orthonormal: white noise of std 1 comes out
with std sqrt(23) / (4 sqrt(2)) = 0.848 in s and sqrt(3 / 2) = 1.225 in d, away from the edges.
"""

from __future__ import annotations

import torch
from torch import Tensor


def analyse(x: Tensor) -> Tensor:
    """Split images into four bands of half their sides.

    Args:
        x: (B, C, H, W), sides even.

    Returns:
        (B, 4 C, H / 2, W / 2): averages of both axes, then details along W, along H, along both.
    """
    bands = [band for part in _split(x, dim=2) for band in _split(part, dim=3)]
    return torch.cat(bands, dim=1)


def synthesise(bands: Tensor) -> Tensor:
    """The inverse of `analyse`, (B, 4 C, H, W) -> (B, C, 2 H, 2 W)."""
    average, along_width, along_height, both = bands.chunk(4, dim=1)
    upper, lower = _join(average, along_width, dim=3), _join(along_height, both, dim=3)
    return _join(upper, lower, dim=2)


def _split(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    detail = odd - (even + _next(even, dim)) / 2
    return even + (_previous(detail, dim) + detail) / 4, detail


def _join(average: Tensor, detail: Tensor, dim: int) -> Tensor:
    even = average - (_previous(detail, dim) + detail) / 4
    odd = detail + (even + _next(even, dim)) / 2
    return torch.stack([even, odd], dim=dim + 1).flatten(dim, dim + 1)


def _next(x: Tensor, dim: int) -> Tensor:
    """x[n + 1]; reflection about the last odd pixel repeats the last even one."""
    size = x.shape[dim]
    return torch.cat([x.narrow(dim, 1, size - 1), x.narrow(dim, size - 1, 1)], dim)


def _previous(x: Tensor, dim: int) -> Tensor:
    """x[n - 1]; reflection about the first even pixel repeats the first detail."""
    return torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
