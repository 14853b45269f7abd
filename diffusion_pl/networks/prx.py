"""PRX over pixels: Photoroom's text-to-image transformer (2025; released code, and diffusers'
`PRXTransformer2DModel`).

| part | formula |
|---|---|
| patches | all numbers of a patch, (channel, row, column); two linear maps through a bottleneck |
| time | [cos, sin] of 1000 c_noise 10000^(-k / 128), k = 0 .. 127; linear, silu, linear |
| size of the image | if asked, [cos, sin] of its height, then of its width; linear, silu, linear |
| block | adaLN-Zero of normalised tokens without weights of their own; attention; gated MLP |
| attention | RMS-normalised queries and keys, rotary positions; the text's keys and values beside |
| MLP | down(gelu(gate(x)) up(x)), gelu by tanh |
| head | normalised, scaled and shifted by the condition; one linear map |

There is no table of positions beside the rotary ones. Its initial output is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError
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
    rotary_table,
    rotated,
)

TIME_FEATURES = 256
EPS = 1e-6  # of every normalisation


class Embedder(nn.Module):
    """Two linear maps with silu between, from sinusoids to the condition's vector.

    Args:
        width: of the vector.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense0 = xavier(nn.Linear(TIME_FEATURES, width))
        self.dense1 = xavier(nn.Linear(width, width))

    def forward(self, sinusoids: Tensor) -> Tensor:
        """(B, 256) -> (B, width)."""
        vector: Tensor = self.dense1(F.silu(self.dense0(sinusoids)))
        return vector


class Attention(nn.Module):
    """Attention of patches to patches and text, without biases.

    Args:
        width: channels of a token, a multiple of `heads`.
        heads: attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = xavier(nn.Linear(width, 3 * width, bias=False))
        self.norm_q = RMSNorm(width // heads, EPS)
        self.norm_k = RMSNorm(width // heads, EPS)
        self.text = TextKeys(width, width, heads, normed=True, bias=False)
        self.proj = xavier(nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor, rotary: Tensor, text: Text) -> Tensor:
        """(B, tokens, width); rotary as `rotated` takes it -> (B, tokens, width)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated(self.norm_q(q), rotary), rotated(self.norm_k(k), rotary)
        output = attended(q.to(v.dtype), k.to(v.dtype), v, text, self.text)
        projected: Tensor = self.proj(output.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """Attention and a gated MLP, each normalised, modulated and gated by the condition.

    Args:
        width: channels of a token, a multiple of `heads`.
        heads: attention heads.
        hidden: width of the MLP.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.gate = xavier(nn.Linear(width, hidden, bias=False))
        self.up = xavier(nn.Linear(width, hidden, bias=False))
        self.down = xavier(nn.Linear(hidden, width, bias=False))
        self.affine = zero(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, rotary: Tensor, text: Text) -> Tensor:
        """(B, tokens, width), silu of the condition (B, width), rotary -> (B, tokens, width)."""
        shift0, scale0, gate0, shift1, scale1, gate1 = self.affine(condition)[:, None].chunk(6, -1)
        x = x + gate0 * self.attention(modulated(_normalised(x), shift0, scale0), rotary, text)
        hidden = modulated(_normalised(x), shift1, scale1)
        hidden = F.gelu(self.gate(hidden), approximate="tanh") * self.up(hidden)
        return x + gate1 * self.down(hidden)


class PRX(Network):
    """PRX; the defaults are diffusers', but for pixels in the place of latents.

    It takes any sides that the patch divides: positions are whole patches from the corner.

    Args:
        text_width: channels of a text's token, at least 1.
        text_length: tokens of the null, at least 1.
        patch_size: side of a patch, pixels.
        width: channels of a token.
        depth: number of blocks.
        heads: attention heads; width / heads a multiple of 4.
        hidden: width of the MLPs; 3.5 widths if None.
        bottleneck: channels between the two linear maps of the patch embedding; 0 for one map.
        sized: the condition is told the sides of the image, pixels, too.
        time_factor: what c_noise is multiplied by.
        routing: in training a part of the patches skips a range of blocks; the text never does.
        resolution, channels, image_channels, activation_checkpointing: as for every `Network`.
        classes: must be 0; it takes no labels.

    Raises:
        UserError: a resolution that the patch does not divide, widths that the heads do not divide,
            no text, labels, or routing beyond the last block.
    """

    def __init__(
        self,
        resolution: int,
        text_width: int,
        text_length: int,
        channels: int = 3,
        classes: int = 0,
        patch_size: int = 16,
        width: int = 1792,
        depth: int = 16,
        heads: int = 28,
        hidden: int | None = None,
        bottleneck: int = 256,
        sized: bool = False,
        time_factor: float = 1000.0,
        routing: Routing | None = None,
        activation_checkpointing: bool = False,
        image_channels: int = 0,
    ) -> None:
        for name, value in {
            "patch_size": patch_size, "width": width, "depth": depth, "heads": heads,
            "text_width": text_width, "text_length": text_length, "time_factor": time_factor,
        }.items():  # fmt: skip
            if value <= 0:
                raise UserError(f"{name} must be positive (got {value})")
        check_heads(width, heads)
        if classes:
            raise UserError(f"PRX takes no labels, classes must be 0 (got {classes})")
        super().__init__(
            resolution, channels, 0, 0, text_width=text_width, text_length=text_length,
            activation_checkpointing=activation_checkpointing, image_channels=image_channels,
        )  # fmt: skip
        self.patch_size = self.divisor = patch_size
        self.check_resolution(resolution, resolution)
        self.head_width, self.time_factor = width // heads, time_factor
        seen = self.in_channels * patch_size**2
        self.patches = xavier(nn.Linear(seen, bottleneck)) if bottleneck else None
        self.stem = xavier(nn.Linear(bottleneck or seen, width))
        self.sinusoids = PositionalEmbedding(TIME_FEATURES, endpoint=False)
        self.time = Embedder(width)
        self.half_sinusoids = PositionalEmbedding(TIME_FEATURES // 2, endpoint=False)
        self.size = Embedder(width) if sized else None
        self.text = xavier(nn.Linear(text_width, width))
        hidden = int(3.5 * width) if hidden is None else hidden
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.router = None if routing is None else Router(routing, depth)
        self.affine = zero(nn.Linear(width, 2 * width))
        self.head = zero(nn.Linear(width, channels * patch_size**2))

    def check_resolution(self, height: int, width: int) -> None:
        """Raise UserError unless patches cover the image."""
        check_sides(height, width, self.divisor)

    def embed(self, c_noise: Tensor) -> Tensor:
        """Embed the noise level in float32, whatever autocast says, (B, width).

        Args:
            c_noise: (B,); the published networks have 1 - t = sigma / (sigma + noise_scale).
        """
        with float32_region(c_noise.device):
            return self.time(_cosine_first(self.sinusoids, self.time_factor * c_noise.float()))

    def denoise(self, x: Tensor, embedding: Tensor, text: Text) -> Tensor:
        """The output of x (B, in_channels, H, W) under an embedding and texts."""
        rows, columns = (side // self.patch_size for side in x.shape[2:])
        condition = F.silu(embedding if self.size is None else embedding + self._sides(x))
        tokens = F.pixel_unshuffle(x, self.patch_size).flatten(2).transpose(1, 2)
        tokens = self.stem(tokens if self.patches is None else self.patches(tokens))
        table = rotary = rotary_table(self.head_width, rows, columns, x.device)
        text = text.through(self.text)
        patches, kept = tokens, None
        for number, block in enumerate(self.blocks):
            if self.router is not None and number == self.router.first:
                patches, kept = tokens, self.router.kept(tokens)
                if kept is not None:
                    tokens, rotary = taken(tokens, kept), chosen(table, kept)
            tokens = run(
                block, tokens, condition, rotary, text, checkpointed=self.activation_checkpointing
            )
            if self.router is not None and kept is not None and number == self.router.last:
                tokens, rotary, kept = restored(tokens, kept, patches), table, None
        shift, scale = self.affine(condition)[:, None].chunk(2, dim=2)
        output: Tensor = self.head(modulated(_normalised(tokens), shift, scale))
        output = output.transpose(1, 2).unflatten(2, (rows, columns))
        return F.pixel_shuffle(output, self.patch_size)

    def _sides(self, x: Tensor) -> Tensor:
        """The embedding of the image's height and width, (1, width)."""
        assert self.size is not None
        with float32_region(x.device):
            sides = torch.tensor(x.shape[2:], dtype=torch.float32, device=x.device)
            return self.size(_cosine_first(self.half_sinusoids, sides).flatten()[None])


def _cosine_first(sinusoids: nn.Module, values: Tensor) -> Tensor:
    """[cos, sin] where the layer has [sin, cos]."""
    waves: Tensor = sinusoids(values)
    return waves.roll(waves.shape[1] // 2, dims=1)


def _normalised(x: Tensor) -> Tensor:
    """Tokens of mean 0 and variance 1."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
