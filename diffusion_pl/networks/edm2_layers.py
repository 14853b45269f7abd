"""Magnitude-preserving layers (Karras 2024, arXiv:2312.02696, Appendix B): unit in, unit out.

The magnitude of an activation is the root of its mean square. Each of these keeps it at 1 on
average over random weights, so nothing in a network of them grows or shrinks as it trains.

| layer | formula | where |
|---|---|---|
| normalize | x / (eps + rms x) | Eq. 30, 66 |
| weights | w / (eps + rms w) / sqrt(fan in), a row for each output | Eq. 47 |
| mp_silu | silu(x) / 0.596 | Eq. 81 |
| mp_sum | ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2) | Eq. 88 |
| mp_cat | sqrt((Na + Nb) / ((1 - t)^2 + t^2)) [(1 - t) a / sqrt Na, t b / sqrt Nb] | Eq. 103 |
| Fourier | sqrt(2) cos(2 pi (f c + p)), f ~ N(0, 1), p ~ U(0, 1) | Eq. 75 |

The formulas are held against the released code; the numbers of the equations are those that its
comments give, not read in the paper itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.text import Text, attended

EPS = 1e-4
SILU = 0.596  # root mean square of silu of a standard normal, to three digits as in the paper


def normalize(x: Tensor, dims: Sequence[int]) -> Tensor:
    """x over its root mean square along `dims`, of x's shape and dtype; 0 stays 0.

    The root is taken in float32 at least, whatever autocast says.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    count = math.prod([x.shape[dim] for dim in dims])
    return x / (norm / math.sqrt(count) + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU, scaled so that a standard normal keeps its magnitude."""
    return F.silu(x) / SILU


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The mixture of two independent tensors, of which b has the share t, at their magnitude."""
    norm = math.hypot(1 - t, t)
    return torch.add(a * ((1 - t) / norm), b, alpha=t / norm)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Two tensors (B, Na, H, W) and (B, Nb, H, W) side by side, b with the share t of what follows.

    Without the weights the one of more channels would have more.
    """
    channels_a, channels_b = a.shape[1], b.shape[1]
    scale = math.sqrt(channels_a + channels_b) / math.hypot(1 - t, t)
    a = a * (scale * (1 - t) / math.sqrt(channels_a))
    return torch.cat([a, b * (scale * t / math.sqrt(channels_b))], dim=1)


class UnitFourier(nn.Module):
    """Cosines of random frequencies and phases, each of mean square 1 over the phases.

    Args:
        channels: how many.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Buffers: drawn once and kept, like weights, but not trained. Radians.
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, c_noise: Tensor) -> Tensor:
        """(B,) -> (B, channels), float32 at least."""
        wide = c_noise.to(torch.promote_types(c_noise.dtype, torch.float32))
        return math.sqrt(2) * torch.cos(wide[:, None] * self.freqs + self.phases)


class UnitLayer(nn.Module):
    """A linear layer or convolution without bias whose rows have norm 1, whatever is stored.

    So the output for independent inputs of magnitude 1 has magnitude 1, and a scale of the stored
    weight changes nothing but how far a step turns it. `force` takes that scale out.

    Args:
        channels_in: channels or features of the input.
        channels_out: of the output.
        side: of the kernel, pixels, odd; None for a linear layer.
    """

    def __init__(self, channels_in: int, channels_out: int, side: int | None = None) -> None:
        super().__init__()
        kernel = () if side is None else (side, side)
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in, *kernel))

    def normalized(self) -> Tensor:
        """The stored weight with rows of magnitude 1."""
        return normalize(self.weight, tuple(range(1, self.weight.ndim)))

    @torch.no_grad()
    def force(self) -> None:
        """Store the normalized weight (forced weight normalization, Eq. 66)."""
        self.weight.copy_(self.normalized())

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """(B, channels_in, H, W) or (B, channels_in) -> the same with channels_out.

        Args:
            x: the input.
            gain: a learned factor (1,) of the output.
        """
        weight = self.normalized() / math.sqrt(self.weight[0].numel())
        weight = (weight if gain is None else weight * gain).to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class CosineAttention(nn.Module):
    """Self-attention over pixels, queries, keys and values of magnitude 1 each (App. B.3).

    Args:
        channels: C, a multiple of `heads`.
        heads: attention heads.
        balance: share of what is attended to in the sum with x.
        text_width: channels of a text's token, of magnitude 1; 0 for no text.
    """

    def __init__(self, channels: int, heads: int, balance: float, text_width: int = 0) -> None:
        super().__init__()
        if channels % heads:
            raise UserError(f"{channels} channels do not divide over {heads} heads of attention")
        self.heads = heads
        self.balance = balance
        self.qkv = UnitLayer(channels, 3 * channels, 1)
        self.proj = UnitLayer(channels, channels, 1)
        self.text = UnitTextKeys(text_width, channels, heads) if text_width else None

    def forward(self, x: Tensor, text: Text | None = None) -> Tensor:
        """(B, C, H, W) -> the same."""
        batch, channels, height, width = x.shape
        # Channels run (head, channel, q/k/v) in the published checkpoints.
        qkv = self.qkv(x).reshape(batch, self.heads, channels // self.heads, 3, -1)
        q, k, v = normalize(qkv, (2,)).permute(3, 0, 1, 4, 2).contiguous()
        output = attended(q, k, v, text, self.text)
        output = output.transpose(2, 3).reshape(batch, channels, height, width)
        return mp_sum(x, self.proj(output), self.balance)


class UnitTextKeys(nn.Module):
    """Makes keys and values of a text's tokens, of magnitude 1 each, as the image's are.

    Args:
        text_width: channels of a token.
        channels: of the attention, a multiple of `heads`.
        heads: attention heads.
    """

    def __init__(self, text_width: int, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv = UnitLayer(text_width, 2 * channels)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, text_width) -> keys and values, each (B, heads, L, channels / heads)."""
        kv = normalize(self.kv(tokens).unflatten(2, (2, self.heads, -1)), (4,))
        k, v = kv.permute(2, 0, 3, 1, 4)
        return k, v
