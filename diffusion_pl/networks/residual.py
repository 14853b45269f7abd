"""The residual block of the U-Nets; what the papers do differently are its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.networks.dropout import Dropout
from diffusion_pl.networks.layers import Layer, group_norm, xavier
from diffusion_pl.networks.text import Text

ZERO = 1e-5  # gain of the layers that begin near zero


class Initialise(Protocol):
    """Gives a layer its initial weights, scaled by a gain."""

    def __call__(self, layer: Layer, gain: float = ..., /) -> Layer: ...


class ResidualBlock(nn.Module):
    """norm, conv, norm with the embedding, dropout, conv; plus x; then attention if asked.

    Args:
        channels_in: channels of x.
        channels_out: channels of the result.
        embedding: length of the embedding vector.
        dropout: probability, before the second convolution.
        adaptive_scale: the embedding scales and shifts what the second norm gives (1 + scale,
            shift); otherwise it is added before that norm.
        fused: scale and shift with one rounding (`torch.addcmul`).
        norm: makes a normalisation of so many channels.
        activate: the nonlinearity.
        activate_embedding: whether the embedding needs it too.
        initialise: of every layer; the last convolution's gain is 1e-5.
        resample: halves or doubles the resolution, between the first nonlinearity and convolution
            and of x; None to keep it.
        project_resampled: a resampled x has its own 1x1 convolution even where the channels agree.
        scale: factor of the sum.
        attention: makes the self-attention that follows, given its norm; None for none.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        embedding: int,
        dropout: float,
        adaptive_scale: bool = False,
        fused: bool = True,
        norm: Callable[[int], nn.GroupNorm] = group_norm,
        activate: Callable[[Tensor], Tensor] = F.silu,
        activate_embedding: bool = False,
        initialise: Initialise = xavier,
        resample: Callable[[Tensor], Tensor] | None = None,
        project_resampled: bool = False,
        scale: float = 1.0,
        attention: Callable[[nn.GroupNorm], nn.Module | None] | None = None,
    ) -> None:
        super().__init__()
        self.drop = Dropout(dropout)
        self.activate = activate
        self.activate_embedding = activate_embedding
        self.adaptive_scale = adaptive_scale
        self.fused = fused
        self.resample = resample
        self.scale = scale
        self.norm0 = norm(channels_in)
        self.conv0 = initialise(nn.Conv2d(channels_in, channels_out, 3, padding=1))
        self.affine = initialise(nn.Linear(embedding, channels_out * (2 if adaptive_scale else 1)))
        self.norm1 = norm(channels_out)
        self.conv1 = initialise(nn.Conv2d(channels_out, channels_out, 3, padding=1), ZERO)
        projects = channels_in != channels_out or (project_resampled and resample is not None)
        self.skip = initialise(nn.Conv2d(channels_in, channels_out, 1)) if projects else None
        self.attention = None if attention is None else attention(norm(channels_out))

    def forward(self, x: Tensor, embedding: Tensor, text: Text | None = None) -> Tensor:
        """(B, channels_in, H, W), (B, embedding) -> (B, channels_out, H', W')."""
        hidden = self.activate(self.norm0(x))
        if self.resample is not None:
            hidden, x = self.resample(hidden), self.resample(x)
        hidden = self.conv0(hidden)
        embedding = self.activate(embedding) if self.activate_embedding else embedding
        vector = self.affine(embedding)[:, :, None, None]
        if not self.adaptive_scale:
            hidden = self.norm1(hidden + vector)
        else:
            scale, shift = vector.chunk(2, dim=1)
            hidden = self.norm1(hidden)
            if self.fused:
                hidden = torch.addcmul(shift, hidden, 1 + scale)
            else:
                hidden = hidden * (1 + scale) + shift
        hidden = self.drop(self.activate(hidden))
        x = self.conv1(hidden) + (x if self.skip is None else self.skip(x))
        x = x if self.scale == 1 else x * self.scale
        return x if self.attention is None else self.attention(x, text)
