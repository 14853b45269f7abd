"""The U-Net with linear attention of the denoising_diffusion_pytorch package (released code, 2.x).

| part | formula | where |
|---|---|---|
| norm | x / abs(x) g sqrt(C), over channels | released code |
| block | silu(norm(conv(x)) (1 + scale) + shift), silu(norm(conv)), + skip | released code |
| linear attention | V softmax_n(K)^T softmax_d(Q) / sqrt(d), with learned keys and values beside | Shen 2018, arXiv:1812.01243 |
| halving | four pixels side by side, then a 1 x 1 convolution | released code |

The innermost level attends in full, the others linearly, unless said otherwise.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.attention import attention
from diffusion_pl.networks.dropout import Dropout
from diffusion_pl.networks.layers import (
    PositionalEmbedding,
    double,
    float32_region,
    run,
)
from diffusion_pl.networks.network import Network


class Norm(nn.Module):
    """Every pixel's channels scaled to the length sqrt(C), times a learned gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.gain * x.shape[1] ** 0.5


class Block(nn.Module):
    """A residual block of two convolutions, the first scaled and shifted by the embedding."""

    def __init__(
        self, channels_in: int, channels_out: int, *, embedding: int, dropout: float
    ) -> None:
        super().__init__()
        self.drop = Dropout(dropout)
        self.affine = nn.Linear(embedding, 2 * channels_out)
        self.conv0 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm0 = Norm(channels_out)
        self.conv1 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.norm1 = Norm(channels_out)
        differ = channels_in != channels_out
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if differ else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, channels_in, H, W), (B, embedding) -> (B, channels_out, H, W)."""
        scale, shift = self.affine(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        hidden = F.silu(self.norm0(self.conv0(x)) * (1 + scale) + shift)
        hidden = F.silu(self.norm1(self.conv1(self.drop(hidden))))
        return hidden + (x if self.skip is None else self.skip(x))


class Attention(nn.Module):
    """Self-attention over pixels and `memories` learned keys and values, added to x.

    Args:
        channels: C of x.
        heads: attention heads.
        head_channels: channels of each.
        memories: learned keys and values a head.
        linear: attend at a cost linear in the pixels.
    """

    def __init__(
        self, channels: int, *, heads: int, head_channels: int, memories: int, linear: bool
    ) -> None:
        super().__init__()
        self.heads, self.linear = heads, linear
        inside = heads * head_channels
        self.norm = Norm(channels)
        sides = (head_channels, memories) if linear else (memories, head_channels)
        self.memory = nn.Parameter(torch.randn(2, heads, *sides))
        self.qkv = nn.Conv2d(channels, 3 * inside, 1, bias=False)
        self.proj = nn.Conv2d(inside, channels, 1)
        self.out_norm = Norm(channels) if linear else None

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        # (B, 3, heads, channels of a head, pixels)
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, -1, height * width)
        q, k, v = qkv.unbind(dim=1)
        memory = self.memory if self.linear else self.memory.transpose(2, 3)
        keys, values = memory[:, None].expand(-1, batch, -1, -1, -1)
        k, v = torch.cat([keys, k], dim=3), torch.cat([values, v], dim=3)
        if self.linear:
            context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=3), v)
            attended = torch.einsum("bhde,bhdn->bhen", context, q.softmax(dim=2))
            attended = attended * q.shape[2] ** -0.5
        else:
            q, k, v = (each.transpose(2, 3) for each in (q, k, v))
            attended = attention(q, k, v).transpose(2, 3)
        out = self.proj(attended.reshape(batch, -1, height, width))
        return x + (out if self.out_norm is None else self.out_norm(out))


class Level(nn.Module):
    """Two blocks, an attention, and what leads to the next level."""

    def __init__(self, blocks: Sequence[Block], attention: Attention, resample: nn.Module) -> None:
        super().__init__()
        self.block0, self.block1 = blocks
        self.attention = attention
        self.resample = resample


class LinearUNet(Network):
    """The U-Net of denoising_diffusion_pytorch.

    Args:
        resolution: H = W of the images it is built for.
        channels: image channels.
        classes: must be 0; it takes no labels.
        model_channels: channels at multiplier 1.
        channel_mult: multiplier of each level, from the full resolution down.
        full: which levels attend in full, one a level; None for the innermost alone.
        heads: of every attention.
        head_channels: channels of a head.
        memories: learned keys and values a head.
        dropout: probability in every block, after its first convolution.
        image_channels: of a source image, 0 for none; as for every `Network`.
        activation_checkpointing: keep only what passes between blocks in training.

    Raises:
        UserError: labels, or a resolution that the levels do not divide.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        classes: int = 0,
        model_channels: int = 64,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        full: Sequence[bool] | None = None,
        heads: int = 4,
        head_channels: int = 32,
        memories: int = 4,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
        image_channels: int = 0,
    ) -> None:
        if classes:
            raise UserError(f"LinearUNet takes no labels, classes must be 0 (got {classes})")
        super().__init__(
            resolution, channels, 0, len(channel_mult) - 1,
            activation_checkpointing=activation_checkpointing, image_channels=image_channels,
        )  # fmt: skip
        embedding = 4 * model_channels
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_layer0 = nn.Linear(model_channels, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        last = len(channel_mult) - 1
        full = full or [level == last for level in range(last + 1)]

        def block(channels_in: int, channels_out: int) -> Block:
            return Block(channels_in, channels_out, embedding=embedding, dropout=dropout)

        def attention(width: int, whole: bool) -> Attention:
            return Attention(
                width, heads=heads, head_channels=head_channels, memories=memories,
                linear=not whole,
            )  # fmt: skip

        widths = [model_channels, *(model_channels * each for each in channel_mult)]
        self.stem = nn.Conv2d(self.in_channels, model_channels, 7, padding=3)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, (narrow, wide) in enumerate(pairwise(widths)):
            down = nn.Conv2d(4 * narrow, wide, 1)
            down = nn.Conv2d(narrow, wide, 3, padding=1) if level == last else down
            blocks = [block(narrow, narrow), block(narrow, narrow)]
            self.encoder.append(Level(blocks, attention(narrow, full[level]), down))
            blocks = [block(wide + narrow, wide), block(wide + narrow, wide)]
            up = nn.Conv2d(wide, narrow, 3, padding=1)
            self.decoder.insert(0, Level(blocks, attention(wide, full[level]), up))
        wide = widths[-1]
        self.middle = nn.ModuleList([block(wide, wide), attention(wide, True), block(wide, wide)])
        self.out_block = block(2 * model_channels, model_channels)
        self.out_conv = nn.Conv2d(model_channels, channels, 1)

    def embed(self, c_noise: Tensor) -> Tensor:
        """Embed the timestep in float32, whatever autocast says, (B, 4 model_channels)."""
        with float32_region(c_noise.device):
            vector: Tensor = self.map_layer1(F.gelu(self.map_layer0(self.map_noise(c_noise))))
            return vector

    def denoise(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The output of x (B, in_channels, H, W) under an embedding."""
        again = self.activation_checkpointing
        x = first = self.stem(x)
        skips = []
        level: Level
        for number, level in enumerate(self.encoder, start=1):  # type: ignore[assignment]
            x = run(level.block0, x, embedding, checkpointed=again)
            skips.append(x)
            x = level.attention(run(level.block1, x, embedding, checkpointed=again))
            skips.append(x)
            last = number == len(self.encoder)
            x = level.resample(x if last else F.pixel_unshuffle(x, 2))
        x = run(self.middle[0], x, embedding, checkpointed=again)
        x = run(self.middle[2], self.middle[1](x), embedding, checkpointed=again)
        for number, level in enumerate(self.decoder, start=1):  # type: ignore[assignment]
            for block in (level.block0, level.block1):
                x = run(block, torch.cat([x, skips.pop()], 1), embedding, checkpointed=again)
            x = level.attention(x)
            x = level.resample(x if number == len(self.decoder) else double(x))
        x = run(self.out_block, torch.cat([x, first], dim=1), embedding, checkpointed=again)
        output: Tensor = self.out_conv(x)
        return output
