"""What the two networks of simple diffusion share (arXiv:2301.11093, section 3.3): how an image is
made small and large again, how the condition is embedded, and the residual block."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.networks.dropout import Dropout
from diffusion_pl.networks.layers import (
    PositionalEmbedding,
    SelfAttention,
    float32_region,
    group_norm,
    one_hot,
    xavier,
)
from diffusion_pl.networks.wavelet import analyse, synthesise

ZERO = 1e-5  # gain of the layers that begin near zero

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


class ResBlock(nn.Module):
    """Norm, silu, conv; norm scaled and shifted by the condition, silu, dropout, conv; plus x.

    Args:
        channels_in: of x.
        channels_out: of the result.
        length: of the condition's vector.
        dropout: probability, before the second convolution.
        heads: of the self-attention that follows; 0 for none.
    """

    def __init__(
        self, channels_in: int, channels_out: int, length: int, dropout: float, heads: int = 0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.drop = Dropout(dropout)
        self.norm0 = group_norm(channels_in)
        self.conv0 = xavier(nn.Conv2d(channels_in, channels_out, 3, padding=1))
        self.affine = xavier(nn.Linear(length, 2 * channels_out))
        self.norm1 = group_norm(channels_out)
        self.conv1 = xavier(nn.Conv2d(channels_out, channels_out, 3, padding=1), ZERO)
        differ = channels_in != channels_out
        self.skip = xavier(nn.Conv2d(channels_in, channels_out, 1)) if differ else None
        self.attention = SelfAttention(group_norm(channels_out), heads) if heads else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, channels_in, H, W), (B, length) -> (B, channels_out, H, W)."""
        hidden = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(condition)[:, :, None, None].chunk(2, dim=1)
        hidden = self.norm1(hidden) * (1 + scale) + shift
        hidden = self.drop(F.silu(hidden))
        x = self.conv1(hidden) + (x if self.skip is None else self.skip(x))
        return x if self.attention is None else self.attention(x)
