"""Weights of the training loss beside the papers' own, as lambda(sigma) on the image's error.

What a paper writes for the error of another prediction is here divided out, so that one formula
serves every network: with SNR = 1 / sigma^2, | eps_hat - eps |^2 = SNR |D - x|^2 and
| v_hat - v |^2 = (1 + SNR) |D - x|^2.

| weight | lambda | where |
|---|---|---|
| X0Weight | 1 | x_0-prediction's own loss |
| min-SNR | min(SNR, gamma) | Hang 2023, arXiv:2303.09556 |
| soft min-SNR | SNR gamma / (SNR + gamma) | Crowson 2024, arXiv:2401.11605 |

The noise's error, and the velocity's as `UnitOutput(1)`, stand in objective.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_pl.errors import UserError


@dataclass(frozen=True)
class X0Weight:
    """1: the squared error of the denoised image itself."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(frozen=True)
class MinSNR:
    """min(1 / sigma^2, gamma): the noise's error, bounded where there is little noise (Hang 2023).

    Args:
        gamma: 5 in the paper, > 0.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check(self.gamma)

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma.square().reciprocal().clamp(max=self.gamma)


@dataclass(frozen=True)
class SoftMinSNR:
    """1 / (sigma^2 + 1 / gamma), half the harmonic mean of SNR and gamma (Crowson 2024).

    Args:
        gamma: > 0; 4 is 1 / sigma_data^2 of images with sigma_data = 0.5.
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        _check(self.gamma)

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma.square() + 1 / self.gamma).reciprocal()


def _check(gamma: float) -> None:
    if gamma <= 0:
        raise UserError(f"gamma must be positive (got {gamma})")
