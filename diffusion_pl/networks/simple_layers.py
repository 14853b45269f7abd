"""What the two networks of simple diffusion share (arXiv:2301.11093, section 3.3): how an image is
made small and large again, how the condition is embedded, and the residual block."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.networks.layers import (
    PositionalEmbedding,
    SelfAttention,
    float32_region,
    group_norm,
    one_hot,
    xavier,
)
from diffusion_pl.networks.residual import ZERO, ResidualBlock
from diffusion_pl.networks.wavelet import analyse, synthesise

# How images are made smaller before the first level: the 5/3 wavelets of every channel, or one
# strided convolution whose patches do not overlap; the paper found the former a little better.
Reduction = Literal["wavelet", "patch"]


class Stem(nn.Module):
    """Image to features of 2^-halvings of its sides.

    Args:
        channels: of the image, C.
        width: of the features.
        halvings: 0 for none.
        reduction: wavelets, 4^halvings C bands before a 3 x 3 convolution, or patches.
    """

    def __init__(self, channels: int, width: int, halvings: int, reduction: Reduction) -> None:
        super().__init__()
        self.wavelets = halvings if reduction == "wavelet" else 0
        if halvings and not self.wavelets:
            patch = 2**halvings
            self.conv = xavier(nn.Conv2d(channels, width, patch, stride=patch))
        else:
            self.conv = xavier(nn.Conv2d(channels * 4**halvings, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H / 2^halvings, W / 2^halvings)."""
        for _ in range(self.wavelets):
            x = analyse(x)
        return self.conv(x)


class Head(nn.Module):
    """The way back: norm, then a convolution and the inverse wavelets, or a transposed convolution.

    Args:
        width: of the features.
        channels: of the image, C.
        halvings: to be undone.
        reduction: as in the stem.
    """

    def __init__(self, width: int, channels: int, halvings: int, reduction: Reduction) -> None:
        super().__init__()
        self.wavelets = halvings if reduction == "wavelet" else 0
        self.norm = group_norm(width)
        self.conv: nn.Conv2d | nn.ConvTranspose2d
        if halvings and not self.wavelets:
            patch = 2**halvings
            self.conv = nn.ConvTranspose2d(width, channels, patch, stride=patch)
            nn.init.xavier_uniform_(self.conv.weight, ZERO)
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        else:
            self.conv = xavier(nn.Conv2d(width, channels * 4**halvings, 3, padding=1), ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> float32 (B, C, 2^halvings H, 2^halvings W)."""
        x = self.conv(F.silu(self.norm(x))).float()  # no bf16 in the sums of the inverse
        for _ in range(self.wavelets):
            x = synthesise(x)
        return x


class Condition(nn.Module):
    """The noise level and the label as one vector: sinusoids, dense, silu, dense, plus the label's.

    Args:
        sinusoids: how many, even.
        length: of the vector.
        classes: number of labels, 0 for none.
    """

    def __init__(self, sinusoids: int, length: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.noise = PositionalEmbedding(sinusoids)
        self.dense0 = xavier(nn.Linear(sinusoids, length))
        self.dense1 = xavier(nn.Linear(length, length))
        self.label = xavier(nn.Linear(classes, length, bias=False)) if classes else None

    def forward(self, c_noise: Tensor, label: Tensor | None) -> Tensor:
        """(B,), int64 (B,) or None -> float32 (B, length), whatever autocast says."""
        with float32_region(c_noise.device):
            vector = self.dense1(F.silu(self.dense0(self.noise(c_noise))))
            if label is None:
                return F.silu(vector)
            assert self.label is not None  # the network sees to it
            known = one_hot(label, self.classes) * math.sqrt(self.classes)
            return F.silu(vector + self.label(known))


def residual_block(
    channels_in: int,
    channels_out: int,
    length: int,
    dropout: float,
    heads: int = 0,
    text_width: int = 0,
) -> ResidualBlock:
    """A residual block under a condition's vector of a length; heads: of the attention, 0 for none.

    The scale and shift are two operations, with the roundings that trained weights have seen.
    """
    return ResidualBlock(
        channels_in, channels_out, embedding=length, dropout=dropout, adaptive_scale=True,
        fused=False,
        attention=partial(SelfAttention, heads=heads, text_width=text_width) if heads else None,
    )  # fmt: skip
