"""Image-shaped sampling problems with exact denoisers: how near does a sampler come to the ODE?

Two families. `Spectrum` is a Gaussian whose variance falls with frequency as natural images' does;
its flow is closed form. `Modes` is a mixture of equal Gaussians around given images, whose denoiser
is the exact posterior mean; its flow is integrated with Heun's method in 2,000 steps that end at a
level of 1e-5. No rule was chosen on the problems of `held_out`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion_pl.diffusion.schedules import Rho, levels
from diffusion_pl.samplers.heun import heun

F64 = torch.float64


class Problem(Protocol):
    """A distribution of images with its denoiser and the flow of its ODE."""

    name: str
    shape: tuple[int, int, int]

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The posterior mean of the image."""

    def end(self, x: Tensor, sigma: float) -> Tensor:
        """The exact solution at sigma = 0 from the state x at a level."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A Gaussian, in the basis in which its components are independent.

    Args:
        name: of the problem.
        stds: standard deviation of every component, float64 (C, H, W).
    """

    name: str
    stds: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.stds.shape)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x * (self.stds.square() / (self.stds.square() + sigma.square()))

    def end(self, x: Tensor, sigma: float) -> Tensor:
        return x * self.stds / (self.stds.square() + sigma**2).sqrt()


@dataclass(frozen=True, eq=False)
class Modes:
    """An equal mixture of Gaussians of one std around images.

    Args:
        name: of the problem.
        centres: the images, float64 (K, C, H, W).
        std: of every component in every pixel.
    """

    name: str
    centres: Tensor
    std: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.centres.shape[1:])

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        flat, centres = x.flatten(1).to(F64), self.centres.flatten(1)
        variance = self.std**2 + sigma.square()
        # |x - c|^2 less what all modes share.
        far = centres.square().sum(1) / 2 - flat @ centres.T
        nearest = torch.softmax(-far / variance, dim=1) @ centres
        share = self.std**2 / variance
        return (share * flat + (1 - share) * nearest).reshape(x.shape)

    def end(self, x: Tensor, sigma: float) -> Tensor:
        fine = levels(Rho(1e-5, sigma), 2000)
        return heun(self.denoise, x, fine, torch.randn_like)


def spectrum(exponent: float, size: int, seed: int) -> Spectrum:
    """Deviations that fall as frequency^-exponent, of rms 0.5, every component jittered."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.fft.fftfreq(size, 1 / size, dtype=F64)
    frequency = torch.hypot(axis[:, None], axis[None, :]).clamp(min=1)
    jitter = torch.exp(0.3 * torch.randn(3, size, size, generator=generator, dtype=F64))
    stds = jitter * frequency**-exponent
    stds *= 0.5 / stds.square().mean().sqrt()
    return Spectrum(f"spectrum 1/f^{2 * exponent:g}, {size} px", stds)


def ring(count: int, std: float, seed: int) -> Modes:
    """Modes on a circle in two dimensions, of radius 0.7, turned and displaced at random."""
    generator = torch.Generator().manual_seed(seed)
    turn, shift = 2 * math.pi * torch.rand(1, generator=generator, dtype=F64), 0.05
    angle = turn + 2 * math.pi * torch.arange(count, dtype=F64) / count
    circle = 0.7 * torch.stack([angle.cos(), angle.sin()], 1)
    circle += shift * torch.randn(count, 2, generator=generator, dtype=F64)
    return Modes(f"ring of {count}, std {std:g}", circle[:, :, None, None], std)


def pictures(count: int, std: float, size: int, seed: int) -> Modes:
    """Smooth random images of 3 channels, of rms 0.5, as modes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator, dtype=F64)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    smooth *= 0.5 / smooth.square().mean((1, 2, 3), keepdim=True).sqrt()
    return Modes(f"{count} pictures, {size} px, std {std:g}", smooth, std)


def selection() -> list[Problem]:
    """What rules may be chosen on."""
    return [spectrum(1.0, 32, 1), ring(8, 0.05, 2), pictures(64, 0.1, 16, 3)]


def held_out() -> list[Problem]:
    """What rules are judged on: 14 problems and seeds that no rule was chosen on."""
    return [
        spectrum(0.5, 32, 11),
        spectrum(0.75, 16, 12),
        spectrum(1.25, 32, 13),
        spectrum(1.5, 16, 14),
        ring(3, 0.1, 21),
        ring(5, 0.07, 22),
        ring(6, 0.05, 23),
        ring(12, 0.05, 24),
        pictures(8, 0.05, 16, 31),
        pictures(16, 0.1, 16, 32),
        pictures(32, 0.2, 8, 33),
        pictures(100, 0.1, 16, 34),
        pictures(128, 0.15, 8, 35),
        pictures(256, 0.1, 8, 36),
    ]


def start(problem: Problem, count: int, seed: int, sigma: float = 80.0) -> Tensor:
    """States at a level, float64 (count, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return sigma * torch.randn(count, *problem.shape, generator=generator, dtype=F64)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Relative l2 error over a batch."""
    return ((found - exact).norm() / exact.norm()).item()
