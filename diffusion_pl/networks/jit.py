"""The JiT transformer: Li & He, Back to Basics: Let Denoising Generative Models Denoise, 2025,
arXiv:2511.13720.

A plain transformer over patches of pixels. Every block is modulated by the noise level and the
label (adaLN-Zero of DiT, arXiv:2212.09748); from one block on, copies of the label's embedding
stand before the patches as further tokens. Its initial output is 0.

Text, which JiT has not, goes in as in PRX (Photoroom 2025, released code): one linear map at the
entry, then further keys and values in every block; see text.py. Not JiT's either is a depthwise
convolution before the MLPs, Sana's (arXiv:2410.10629, section 2.2) but that it stands before the
expansion: a transformer of a few thousand steps learns slowly that neighbours belong together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.dropout import Dropout
from diffusion_pl.networks.layers import PositionalEmbedding, float32_region, run, xavier, zero
from diffusion_pl.networks.network import Network
from diffusion_pl.networks.routing import Router, Routing, restored, taken
from diffusion_pl.networks.text import Text, TextKeys, attended
from diffusion_pl.networks.tokens import (
    RMSNorm,
    check_heads,
    check_sides,
    chosen,
    modulated,
    patch_table,
    rotary_table,
    rotated,
    unrotated,
)

TIME_FEATURES = 256


class Attention(nn.Module):
    """Self-attention with normalised queries and keys and rotary positions.

    Args:
        width: channels of a token, a multiple of `heads`.
        heads: attention heads.
        dropout: probability, of the output.
        text: whether there are texts to attend to, whose tokens have `width` channels.
    """

    def __init__(self, width: int, heads: int, dropout: float, text: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = xavier(nn.Linear(width, 3 * width))
        self.norm_q = RMSNorm(width // heads)
        self.norm_k = RMSNorm(width // heads)
        self.proj = xavier(nn.Linear(width, width))
        self.drop = Dropout(dropout)
        self.text = TextKeys(width, width, heads, normed=True) if text else None

    def forward(self, x: Tensor, rotary: Tensor, text: Text | None = None) -> Tensor:
        """(B, tokens, width); rotary as `rotated` takes it -> (B, tokens, width)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated(self.norm_q(q), rotary), rotated(self.norm_k(k), rotary)
        output = attended(q.to(v.dtype), k.to(v.dtype), v, text, self.text)
        projected: Tensor = self.drop(self.proj(output.transpose(1, 2).flatten(2)))
        return projected


class SwiGLU(nn.Module):
    """MLP gated by SiLU (Shazeer 2020, arXiv:2002.05202): w3(silu(gate) * value).

    Args:
        width: channels of a token.
        dropout: probability, of the hidden values.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        hidden = 4 * width * 2 // 3  # as many weights as an MLP of 4 width
        self.w12 = xavier(nn.Linear(width, 2 * hidden))
        self.w3 = xavier(nn.Linear(hidden, width))
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> the same."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        output: Tensor = self.w3(self.drop(F.silu(gate) * value))
        return output


class Neighbours(nn.Module):
    """Adds to every patch a depthwise convolution over those around it; the border is padded by 0.

    Args:
        width: channels of a token.
        side: of the kernel, in patches, odd.
    """

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, side, padding=side // 2, groups=width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, tokens, width), of which the last are the patches of a grid -> the same."""
        front = x.shape[1] - grid[0] * grid[1]
        patches = x[:, front:].transpose(1, 2).unflatten(2, grid)
        added = self.conv(patches).flatten(2).transpose(1, 2)
        return x + (F.pad(added, (0, 0, front, 0)) if front else added)


class Block(nn.Module):
    """Attention and an MLP, each normalised, modulated and gated by the condition.

    Args:
        width: channels of a token, a multiple of `heads`.
        heads: attention heads.
        dropout: probability, in both.
        text: whether the attention has texts too.
        convolution: side of a kernel over neighbouring patches before the MLP, 0 for none.
    """

    def __init__(
        self, width: int, heads: int, dropout: float, text: bool = False, convolution: int = 0
    ) -> None:
        super().__init__()
        self.norm0 = RMSNorm(width)
        self.attention = Attention(width, heads, dropout, text)
        self.norm1 = RMSNorm(width)
        self.mlp = SwiGLU(width, dropout)
        self.affine = zero(nn.Linear(width, 6 * width))
        self.neighbours = Neighbours(width, convolution) if convolution else None

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rotary: Tensor,
        text: Text | None = None,
        grid: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """(B, tokens, width), silu of the condition (B, width), rotary -> (B, tokens, width).

        The last of the tokens are the patches of a grid, rows and columns.
        """
        shift0, scale0, gate0, shift1, scale1, gate1 = self.affine(condition)[:, None].chunk(6, -1)
        x = x + gate0 * self.attention(modulated(self.norm0(x), shift0, scale0), rotary, text)
        hidden = modulated(self.norm1(x), shift1, scale1)
        if self.neighbours is not None:
            hidden = self.neighbours(hidden, grid)
        return x + gate1 * self.mlp(hidden)


def normal(layer: nn.Linear) -> nn.Linear:
    """Initialise a layer with weights of standard deviation 0.02 and biases 0."""
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def as_matrix(layer: nn.Conv2d) -> nn.Conv2d:
    """Initialise a convolution over patches as the linear map that it is: Xavier-uniform."""
    nn.init.xavier_uniform_(layer.weight.data.flatten(1))  # a view of the weights
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class JiT(Network):
    """Transformer over patches of pixels (arXiv:2511.13720, Tables 1 and 9).

    The defaults are JiT-B/16: 131,123,712 parameters with 1000 classes at 256 pixels. It takes any
    sides that the patch divides: positions are whole patches from the corner, not scaled.

    Args:
        patch_size: side of a patch, pixels; image side / 16 in the paper.
        width: channels of a token.
        depth: number of blocks.
        heads: attention heads; width / heads a multiple of 4.
        bottleneck: channels between the two linear maps of the patch embedding.
        class_tokens: copies of the label's embedding before the patches; 0 without classes.
        class_tokens_from: the block, from 0, before which they enter.
        dropout: probability, in the middle half of the blocks.
        routing: in training a part of the patches skips a range of blocks; class tokens never do.
        convolution: side of a depthwise kernel over neighbouring patches before every MLP, odd; 0
            for none, as published.
        resolution, channels, classes, position_frequencies, frame, text_width, text_length,
            image_channels, learned_variance, activation_checkpointing: as for every `Network`.

    Raises:
        UserError: a resolution that the patch does not divide, widths that the heads do not divide,
            class tokens without classes or beyond the last block, routing beyond it, an even
            kernel, or one beside routing, which takes patches away from their neighbours.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        classes: int = 0,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        bottleneck: int = 128,
        class_tokens: int = 32,
        class_tokens_from: int = 4,
        dropout: float = 0.0,
        routing: Routing | None = None,
        convolution: int = 0,
        position_frequencies: int = 0,
        frame: int | None = None,
        learned_variance: bool = False,
        activation_checkpointing: bool = False,
        text_width: int = 0,
        text_length: int = 0,
        image_channels: int = 0,
    ) -> None:
        sizes = {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads}
        for name, value in {**sizes, "bottleneck": bottleneck}.items():
            if value < 1:
                raise UserError(f"{name} must be at least 1 (got {value})")
        if not 0 <= dropout < 1 or (dropout and depth < 4):
            raise UserError(
                "dropout must be in [0, 1), and 0 below 4 blocks, which have no middle half (got "
                f"{dropout} for depth {depth})"
            )
        check_heads(width, heads)
        if class_tokens and not classes:
            raise UserError(
                f"class tokens need classes (got class_tokens: {class_tokens}, classes: 0); set "
                "class_tokens: 0"
            )
        if class_tokens and not 0 <= class_tokens_from < depth:
            raise UserError(
                f"class_tokens_from must be a block from 0 to {depth - 1} (got {class_tokens_from})"
            )
        if convolution and (convolution < 0 or convolution % 2 == 0):
            raise UserError(f"convolution must be 0 or an odd side (got {convolution})")
        if convolution and routing is not None:
            raise UserError("convolution needs all patches of an image; leave it or routing out")
        super().__init__(
            resolution, channels, classes, 0,
            position_frequencies=position_frequencies, frame=frame,
            learned_variance=learned_variance, activation_checkpointing=activation_checkpointing,
            text_width=text_width, text_length=text_length, image_channels=image_channels,
        )  # fmt: skip
        self.patch_size = self.divisor = patch_size
        self.check_resolution(resolution, resolution)
        self.width, self.head_width = width, width // heads
        self.class_tokens, self.class_tokens_from = class_tokens, class_tokens_from
        self.convolution = convolution
        self.patches = as_matrix(
            nn.Conv2d(self.in_channels, bottleneck, patch_size, patch_size, bias=False)
        )
        self.stem = as_matrix(nn.Conv2d(bottleneck, width, 1))
        self.time = PositionalEmbedding(TIME_FEATURES, endpoint=False)
        self.time0 = normal(nn.Linear(TIME_FEATURES, width))
        self.time1 = normal(nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None  # the last: no label
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        self.class_positions = (
            nn.Parameter(torch.randn(class_tokens, width) * 0.02) if class_tokens else None
        )
        middle = range(depth // 4, 3 * (depth // 4))
        self.blocks = nn.ModuleList(
            Block(width, heads, dropout if number in middle else 0.0, bool(text_width), convolution)
            for number in range(depth)
        )
        self.text = xavier(nn.Linear(text_width, width)) if text_width else None
        self.router = None if routing is None else Router(routing, depth)
        self.norm = RMSNorm(width)
        self.affine = zero(nn.Linear(width, 2 * width))
        self.head = zero(nn.Linear(width, patch_size**2 * self.out_channels))

    def check_resolution(self, height: int, width: int) -> None:
        """Raise UserError unless patches cover the image."""
        check_sides(height, width, self.divisor)

    def embed(self, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Embed the condition in float32, whatever autocast says, (B, 2 width).

        Args:
            c_noise: (B,); the published networks have t = 1 / (1 + sigma / noise_scale), unscaled.
            label: int64 (B,), -1 for no label.

        Returns:
            The sum of the embeddings of c_noise and label, then that of the label alone.
        """
        with float32_region(c_noise.device):
            vector = self.time1(F.silu(self.time0(self.time(c_noise))))
            if self.label is None:
                return torch.cat([vector, torch.zeros_like(vector)], dim=1)
            if label is None:
                label = torch.full_like(c_noise, self.classes, dtype=torch.int64)
            label = torch.where(label < 0, self.classes, label)
            own = self.label(label)
            return torch.cat([vector + own, own], dim=1)

    def denoise(self, x: Tensor, embedding: Tensor, text: Text | None = None) -> Tensor:
        """The output of x (B, in_channels, H, W) under an embedding and texts."""
        rows, columns = (side // self.patch_size for side in x.shape[2:])
        vector, own = embedding.chunk(2, dim=1)
        condition = F.silu(vector)
        tokens = self.stem(self.patches(x)).flatten(2).transpose(1, 2)
        tokens = tokens + patch_table(self.width, rows, columns, x.device)
        table = rotary = rotary_table(self.head_width, rows, columns, x.device)
        text = text.through(self.text) if text and self.text else None
        front, patches, kept = 0, tokens, None
        for number, block in enumerate(self.blocks):
            if self.class_positions is not None and number == self.class_tokens_from:
                own_tokens = own[:, None] + self.class_positions
                tokens = torch.cat([own_tokens.to(tokens.dtype), tokens], dim=1)
                front, rotary = self.class_tokens, unrotated(self.class_tokens, rotary)
            if self.router is not None and number == self.router.first:
                patches = tokens[:, front:]
                kept = self.router.kept(patches)
                if kept is not None:
                    tokens = taken(tokens, kept, front)
                    rotary = unrotated(front, chosen(table, kept))
            tokens = run(
                block, tokens, condition, rotary, text, (rows, columns),
                checkpointed=self.activation_checkpointing,
            )  # fmt: skip
            if self.router is not None and kept is not None and number == self.router.last:
                tokens = restored(tokens, kept, patches, front)
                rotary, kept = unrotated(front, table), None
        tokens = tokens[:, self.class_tokens :]
        shift, scale = self.affine(condition)[:, None].chunk(2, dim=2)
        patches = self.head(modulated(self.norm(tokens), shift, scale))
        patches = patches.unflatten(1, (rows, columns))
        patches = patches.unflatten(3, (self.patch_size, self.patch_size, self.out_channels))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)
