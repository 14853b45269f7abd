"""Parts of Song's U-Nets in EDM's form (Karras 2022, Table 8): resampling and embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.layers import double, halve, xavier


def kernel(taps: Sequence[int]) -> Tensor:
    """The filter taps x taps, of sum 1, as a kernel (1, 1, K, K).

    Raises:
        UserError: an odd number of taps: the filter would not lie between the pixels.
    """
    if len(taps) < 2 or len(taps) % 2:
        raise UserError(f"resample_filter needs an even number of taps (got {list(taps)})")
    line = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(line, line) / line.sum().square())[None, None]


class Resample(nn.Module):
    """Halve or double the resolution through a filter, zeros beyond the image's edge.

    Args:
        direction: what to do.
        taps: of the filter along either axis, an even number; [1, 1] averages or repeats pixels.
        padded: whether the image needs the rim of zeros; not if it comes that much larger.
    """

    kernel: Tensor | None

    def __init__(
        self, direction: Literal["halve", "double"], taps: Sequence[int], *, padded: bool = True
    ) -> None:
        super().__init__()
        self.direction = direction
        self.pad = len(taps) // 2 - 1 if padded else 0
        # Plain pooling and repeating do [1, 1] without a convolution.
        filtered = None if tuple(taps) == (1, 1) else kernel(taps)
        self.register_buffer("kernel", filtered, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2) or (B, C, 2 H, 2 W)."""
        if self.kernel is None:
            return halve(x) if self.direction == "halve" else double(x)
        channels = x.shape[1]
        each = self.kernel.to(x.dtype).expand(channels, -1, -1, -1)
        if self.direction == "halve":
            return F.conv2d(x, each, stride=2, padding=self.pad, groups=channels)
        # Zeros between the pixels take three quarters of the sum.
        return F.conv_transpose2d(x, 4 * each, stride=2, padding=self.pad, groups=channels)


class AuxiliaryHalving(nn.Module):
    """The residual encoder's way down: a 3x3 convolution, then the filter at stride 2.

    The filter's rim lies around what it reads, so here around the convolution's output: that runs
    over a larger image and no zeros follow.

    Args:
        channels_in: channels of the auxiliary image.
        channels_out: channels of the level it joins.
        taps: of the resampling filter.
    """

    def __init__(self, channels_in: int, channels_out: int, taps: Sequence[int]) -> None:
        super().__init__()
        self.resample = Resample("halve", taps, padded=False)
        self.conv = xavier(nn.Conv2d(channels_in, channels_out, 3, padding=len(taps) // 2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) -> (B, channels_out, H/2, W/2)."""
        return self.resample(self.conv(x))


class FourierEmbedding(nn.Module):
    """Sinusoids of c_noise at random frequencies, [sin, cos], drawn once and kept (Song 2021).

    Args:
        channels: C, even; half of them sines.
        scale: standard deviation of the frequencies, cycles a unit of c_noise.
    """

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, c_noise: Tensor) -> Tensor:
        """(B,) -> float32 (B, C)."""
        phase = c_noise.to(torch.float32)[:, None] * (2 * math.pi * self.freqs.to(torch.float32))
        return torch.cat([phase.sin(), phase.cos()], dim=1)
