"""Layers that the papers' networks share: normalisation, resampling, attention, initialisation."""

from __future__ import annotations

import contextlib
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_pl.networks.text import Text, TextKeys, attended


class GroupNorm(nn.GroupNorm):
    """Group normalisation, of few channels in bfloat16 with the channels first on CPUs.

    There torch takes up to 12 times as long with the channels last, as training has them.
    """

    FEW = 64  # channels; measured with AMX: 0.7 of a training step up to 64, 1.05 for 128 and more

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or self.num_channels > self.FEW:
            return super().forward(x)
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def group_norm(channels: int, eps: float = 1e-6) -> nn.GroupNorm:
    """Group normalisation with 32 groups, fewer where a group would hold under 4 channels."""
    return GroupNorm(min(32, channels // 4), channels, eps=eps)


def halve(x: Tensor) -> Tensor:
    """Mean over 2 x 2 pixels: the filter [1, 1] at stride 2, (B, C, H, W) -> (B, C, H/2, W/2)."""
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """Repeat each pixel 2 x 2 times: the filter [1, 1] transposed, to (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def float32_region(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off, for what must stay accurate; a device without autocast is as it is."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def run(layer: nn.Module, x: Tensor, *condition: Any, checkpointed: bool) -> Tensor:
    """Apply a layer; checkpointed, its activations are not kept for the backward pass, which runs
    it again."""
    again = checkpointed and torch.is_grad_enabled()
    output: Tensor = (
        checkpoint(layer, x, *condition, use_reentrant=False) if again else layer(x, *condition)
    )
    return output


Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def xavier(layer: Layer, gain: float = 1.0) -> Layer:
    """Initialise a layer as EDM's DDPM++: weights Xavier-uniform times a gain, biases 0."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def zero(layer: Layer) -> Layer:
    """Begin a layer at exactly zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class SelfAttention(nn.Module):
    """Self-attention over pixels with a residual connection: scale (x + proj(attend(norm(x)))).

    A text joins its keys and values through a linear map of the layer's own (see text.py).

    Args:
        norm: group normalisation over C channels, C a multiple of `heads`.
        heads: attention heads.
        scale: factor of the sum, sqrt(1/2) keeps its variance.
        gain: of the initial weights that make queries, keys and values.
        text_width: channels of a text's token; 0 for no text.
    """

    def __init__(
        self,
        norm: nn.GroupNorm,
        heads: int = 1,
        scale: float = 1.0,
        gain: float = 1.0,
        text_width: int = 0,
    ) -> None:
        super().__init__()
        channels = norm.num_channels
        self.heads = heads
        self.scale = scale
        self.norm = norm
        self.qkv = xavier(nn.Conv2d(channels, 3 * channels, 1), gain)
        self.proj = xavier(nn.Conv2d(channels, channels, 1), gain=1e-5)
        self.text = TextKeys(text_width, channels, heads) if text_width else None

    def forward(self, x: Tensor, text: Text | None = None) -> Tensor:
        batch, channels, height, width = x.shape
        # Channels run (head, channel, q/k/v) in the published checkpoints.
        qkv = self.qkv(self.norm(x)).reshape(batch, self.heads, channels // self.heads, 3, -1)
        # Copied, since attention that keeps no matrix of weights wants its channels side by side.
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()
        output = attended(q, k, v, text, self.text)
        output = output.transpose(2, 3).reshape(batch, channels, height, width)
        return (x + self.proj(output)) * self.scale


class PositionalEmbedding(nn.Module):
    """Sinusoids of c_noise, [sin, cos], frequencies 10000^(-k / (half - 1)) (Ho 2020, App. B).

    Args:
        channels: C, even; half of them sines.
        endpoint: whether the last frequency is 1 / 10000 itself; 10000^(-k / half) otherwise.
    """

    def __init__(self, channels: int, *, endpoint: bool = True) -> None:
        super().__init__()
        self.channels = channels
        self.endpoint = endpoint

    def forward(self, c_noise: Tensor) -> Tensor:
        """(B,) -> float32 (B, C)."""
        half = self.channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=c_noise.device)
        exponent = exponent / (half - self.endpoint)
        phase = c_noise.to(torch.float32)[:, None] * (1 / 10000) ** exponent
        return torch.cat([phase.sin(), phase.cos()], dim=1)


def one_hot(label: Tensor, classes: int) -> Tensor:
    """Rows of a unit matrix, zeros for label -1, no label: int64 (B,) -> float32 (B, classes)."""
    return F.one_hot(label.clamp(min=0), classes) * (label >= 0).to(torch.float32)[:, None]
