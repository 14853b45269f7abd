"""The simplest extractor: an image's means over 8 x 8 areas, for position and colour.

Unlike pooled features of a network they see position, but no texture. There are no weights.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_pl.metrics.features import Features, require_rgb

SIDE = 8  # areas a side


class Pixels(nn.Module):
    """Means over areas, in units of the full range of a byte."""

    name = "pixels"
    dimension = 3 * SIDE * SIDE
    classes = 0
    spatial = 0
    resize = f"area to {SIDE} px"
    precision = "fp32"
    error: float | None = None
    digest = hashlib.sha256(resize.encode()).hexdigest()[:12]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3 or 1, H, W), any size: pooled (B, 192) in [0, 1]."""
        means = functional.adaptive_avg_pool2d(require_rgb(images).double() / 255, SIDE)
        return Features(means.flatten(1).float())
