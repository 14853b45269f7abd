"""Denoisers that keep account of what passes through them: how often, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise


class Counted:
    """A denoiser that counts the evaluations of the network: an image seen once counts one.

    A call on twice the images, as classifier-free guidance makes, is two evaluations of each.
    """

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.seen = 0

    def __call__(self, x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        self.seen += len(x)
        return self.denoise(x, sigma, **more)


class Recorded:
    """A denoiser that keeps the denoised image at chosen levels: progressive generation.

    What is kept is the network's guess of the clean image, D, as in Ho 2020, Fig. 6.

    Args:
        denoise: D.
        levels: noise levels, in any order; each is recorded at the first evaluation at or below
            it, so an integrator that churns or stops in between is recorded too.
    """

    def __init__(self, denoise: Denoise, levels: Sequence[float]) -> None:
        self.denoise = denoise
        self.wanted = sorted(levels, reverse=True)
        self.images: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        denoised = self.denoise(x, sigma, **more)
        while self.wanted and float(sigma) <= self.wanted[0] * (1 + 1e-9):
            self.wanted.pop(0)
            self.images.append(denoised[:, : x.shape[1]])
        return denoised
