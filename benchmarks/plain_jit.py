"""A stand-in for JiT in plain PyTorch modules: attention and normalisation step by step.

It is this project's own, written from the paper's description, to have something to measure against
where the published code cannot be run. The same state dict fits it and `networks.jit.JiT`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PlainRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x cos + (its pairs, turned by a right angle) sin."""
    pairs = x.unflatten(-1, (-1, 2))
    quarter = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return x * cos + quarter * sin


class PlainAttention(nn.Module):
    """Softmax(q k^T / sqrt(width)) v with every matrix in memory."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = PlainRMSNorm(width // heads), PlainRMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, tokens, width) -> the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q, k = turned(self.norm_q(q), cos, sin), turned(self.norm_k(k), cos, sin)
        weights = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        attended = weights.float().softmax(dim=-1).to(v.dtype) @ v
        output: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))
        return output


class PlainSwiGLU(nn.Module):
    """w3(silu(gate) * value)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> the same."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        output: Tensor = self.w3(nn.functional.silu(gate) * value)
        return output


class PlainBlock(nn.Module):
    """Attention and MLP under adaLN-Zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm0, self.norm1 = PlainRMSNorm(width), PlainRMSNorm(width)
        self.attention = PlainAttention(width, heads)
        self.mlp = PlainSwiGLU(width)
        self.affine = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, tokens, width) -> the same."""
        parts = self.affine(nn.functional.silu(condition)).chunk(6, dim=-1)
        shift0, scale0, gate0, shift1, scale1, gate1 = (part.unsqueeze(1) for part in parts)
        x = x + gate0 * self.attention(self.norm0(x) * (1 + scale0) + shift0, cos, sin)
        return x + gate1 * self.mlp(self.norm1(x) * (1 + scale1) + shift1)


class PlainJiT(nn.Module):
    """The network; arguments as `networks.jit.JiT`."""

    def __init__(
        self,
        resolution: int,
        classes: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        bottleneck: int,
        class_tokens: int,
        class_tokens_from: int,
    ) -> None:
        super().__init__()
        self.classes, self.patch_size, self.start = classes, patch_size, class_tokens_from
        self.side = resolution // patch_size
        self.patches = nn.Conv2d(3, bottleneck, patch_size, patch_size, bias=False)
        self.stem = nn.Conv2d(bottleneck, width, 1)
        self.time0, self.time1 = nn.Linear(256, width), nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, width)
        self.class_positions = nn.Parameter(torch.zeros(class_tokens, width))
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.norm = PlainRMSNorm(width)
        self.affine = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch_size**2 * 3)
        place = torch.arange(self.side).float()
        row, column = place.repeat_interleave(self.side), place.repeat(self.side)
        absolute = 10000 ** (-torch.arange(width // 4) / (width // 4))
        parts = [row[:, None] * absolute, column[:, None] * absolute]
        table = [parts[1].sin(), parts[1].cos(), parts[0].sin(), parts[0].cos()]
        self.register_buffer("table", torch.cat(table, dim=1), persistent=False)
        quarter = width // heads // 4
        rotary = 10000 ** (-torch.arange(quarter) / quarter)
        angles = torch.cat([row[:, None] * rotary, column[:, None] * rotary], dim=1)
        angles = angles.repeat_interleave(2, dim=1)
        front = torch.zeros(class_tokens, angles.shape[1])
        angles = torch.cat([front, angles])
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, 3, H, W), (B,), (B,) -> (B, 3, H, W)."""
        label = torch.full_like(t, -1, dtype=torch.int64) if label is None else label
        own = self.label(torch.where(label < 0, self.classes, label))
        phase = t[:, None] * 10000 ** (-torch.arange(128, device=t.device) / 128)
        waves = torch.cat([phase.sin(), phase.cos()], dim=1)
        condition = self.time1(nn.functional.silu(self.time0(waves))) + own
        tokens = self.stem(self.patches(x)).flatten(2).transpose(1, 2) + self.table
        count = len(self.class_positions)
        for number, block in enumerate(self.blocks):
            if number == self.start:
                tokens = torch.cat([own[:, None] + self.class_positions, tokens], dim=1)
            skip = 0 if number >= self.start else count
            tokens = block(tokens, condition, self.cos[skip:], self.sin[skip:])
        shift, scale = self.affine(nn.functional.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
        patches = self.head(self.norm(tokens[:, count:]) * (1 + scale) + shift)
        patches = patches.reshape(-1, self.side, self.side, self.patch_size, self.patch_size, 3)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(x.shape)
