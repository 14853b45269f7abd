"""The U-ViT of simple diffusion (arXiv:2301.11093, section 3.3) and SiD2's (arXiv:2410.19324)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.dropout import Dropout
from diffusion_pl.networks.layers import double, halve, run, xavier
from diffusion_pl.networks.network import Network
from diffusion_pl.networks.residual import ZERO
from diffusion_pl.networks.routing import Router, Routing, restored, taken
from diffusion_pl.networks.simple_layers import Condition, Head, Reduction, Stem, residual_block
from diffusion_pl.networks.text import Text, TextKeys, attended


class Transformer(nn.Module):
    """An MLP under the condition, then self-attention, each beside a residual connection.

    Args:
        width: channels of a token, a multiple of `heads`.
        heads: attention heads.
        length: of the condition's vector.
        dropout: probability, inside the MLP.
        expansion: width of the MLP, in `width`.
        text: whether there are texts to attend to, whose tokens have `width` channels.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        length: int,
        dropout: float,
        expansion: int = 4,
        text: bool = False,
    ) -> None:
        if heads < 1 or width % heads:
            raise UserError(f"{width} channels do not divide over {heads} heads of attention")
        super().__init__()
        self.heads = heads
        self.drop = Dropout(dropout)
        self.norm0 = nn.LayerNorm(width)
        self.affine = xavier(nn.Linear(length, 2 * width))
        self.dense0 = xavier(nn.Linear(width, expansion * width))
        self.dense1 = xavier(nn.Linear(expansion * width, width), ZERO)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = xavier(nn.Linear(width, 3 * width))
        self.proj = xavier(nn.Linear(width, width), ZERO)
        self.text = TextKeys(width, width, heads) if text else None

    def forward(self, x: Tensor, condition: Tensor, text: Text | None = None) -> Tensor:
        """(B, tokens, width), (B, length) -> (B, tokens, width)."""
        scale, shift = self.affine(condition)[:, None].chunk(2, dim=2)
        hidden = F.gelu(self.dense0(self.norm0(x) * (1 + scale) + shift))
        x = x + self.dense1(self.drop(hidden))
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return x + self.proj(attended(q, k, v, text, self.text).transpose(1, 2).flatten(2))


class UViT(Network):
    """Residual blocks at high resolution around a stack of transformers at 16 x 16.

    2,028,255,875 parameters with the defaults, 128 pixels and 1000 classes, near the 2 B that are
    recalled of the paper's U-ViT L; the settings are recalled too. Tokens carry no table of
    positions: the convolutions around them tell where a pixel lies, and any resolution is taken.

    Per-block skip connections join the residual blocks only. With `residual` there is one a
    level instead: h before it is halved to h_d comes back as Up(y - h_d) + h, y what the inner
    levels make of h_d.

    Text joins the keys and values of every transformer (see text.py). Its tokens are normalised as
    the image's are before those are made: linear map to the width, LayerNorm.

    Args:
        model_channels: channels at multiplier 1, a multiple of 4.
        channel_mult: multiplier of each level, the last one the transformers'.
        blocks: residual blocks of each other level in the encoder, as many in the decoder.
        transformers: how many.
        heads: of the self-attention.
        dropout: probability in the transformers; elsewhere there is none.
        embedding_channels: length of the condition's vector.
        halvings: of the image before the first level, 1 for 256 and 2 for 512 pixels.
        reduction: how.
        residual: SiD2's skip connections.
        routing: in training a part of the tokens skips a range of transformers.
        resolution, channels, classes, position_frequencies, frame, text_width, text_length,
            image_channels, activation_checkpointing: as for every `Network`.

    Raises:
        UserError: a resolution that the levels do not divide, blocks that do not fit them, or
            routing beyond the transformers.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        classes: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 16),
        blocks: Sequence[int] = (3, 3, 3),
        transformers: int = 36,
        heads: int = 4,
        dropout: float = 0.1,
        embedding_channels: int = 1024,
        halvings: int = 0,
        reduction: Reduction = "wavelet",
        residual: bool = False,
        routing: Routing | None = None,
        position_frequencies: int = 0,
        frame: int | None = None,
        activation_checkpointing: bool = False,
        text_width: int = 0,
        text_length: int = 0,
        image_channels: int = 0,
    ) -> None:
        if len(blocks) != len(channel_mult) - 1:
            raise UserError(
                "blocks need a number for each level but the transformers' "
                f"(got {len(blocks)} for {len(channel_mult)} levels)"
            )
        super().__init__(
            resolution, channels, classes, halvings + len(blocks),
            position_frequencies=position_frequencies, frame=frame,
            activation_checkpointing=activation_checkpointing,
            text_width=text_width, text_length=text_length, image_channels=image_channels,
        )  # fmt: skip
        if transformers < 1:
            raise UserError(f"transformers must be at least 1 (got {transformers})")
        self.residual = residual
        length = embedding_channels
        self.condition = Condition(model_channels, length, classes)
        widths = [model_channels * multiplier for multiplier in channel_mult]
        self.stem = Stem(self.in_channels, widths[0], halvings, reduction)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for width, inner, count in zip(widths, widths[1:], blocks, strict=False):
            joined = width if residual else 2 * width
            self.encoder.append(
                nn.ModuleList(residual_block(width, width, length, 0.0) for _ in range(count))
            )
            self.down.append(xavier(nn.Conv2d(width, inner, 1)))
            self.up.insert(0, xavier(nn.Conv2d(inner, width, 1)))
            self.decoder.insert(
                0, nn.ModuleList(residual_block(joined, width, length, 0.0) for _ in range(count))
            )
        self.middle = nn.ModuleList(
            Transformer(widths[-1], heads, length, dropout, text=bool(text_width))
            for _ in range(transformers)
        )
        self.text: nn.Module | None = None
        if text_width:
            entry = xavier(nn.Linear(text_width, widths[-1]))
            self.text = nn.Sequential(entry, nn.LayerNorm(widths[-1]))
        self.router = None if routing is None else Router(routing, transformers)
        self.head = Head(widths[0], channels, halvings, reduction)

    def embed(self, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Embed the condition in float32, whatever autocast says, (B, embedding_channels)."""
        return self.condition(c_noise, label)

    def denoise(self, x: Tensor, embedding: Tensor, text: Text | None = None) -> Tensor:
        """The output of x (B, in_channels, H, W) under an embedding and texts."""
        x = self.stem(x)
        skips = []
        for layers, down in zip(self.encoder, self.down, strict=True):
            for layer in layers.children():
                x = run(layer, x, embedding, checkpointed=self.activation_checkpointing)
                skips.append(x)
            x = down(halve(x))
            skips.append(x)
        x = self.transform(x, embedding, text)
        for layers, up in zip(self.decoder, self.up, strict=True):
            halved = skips.pop()
            x = double(up(x - halved)) + skips[-1] if self.residual else double(up(x))
            for layer in layers.children():
                skip = skips.pop()
                x = x if self.residual else torch.cat([x, skip], dim=1)
                x = run(layer, x, embedding, checkpointed=self.activation_checkpointing)
        return self.head(x)

    def transform(self, x: Tensor, condition: Tensor, text: Text | None = None) -> Tensor:
        """Pass the pixels through the transformers as tokens, (B, C, H, W) -> (B, C, H, W)."""
        shape = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        whole, kept = tokens, None
        text = text.through(self.text) if text and self.text else None
        for number, layer in enumerate(self.middle):
            if self.router is not None and number == self.router.first:
                whole, kept = tokens, self.router.kept(tokens)
                tokens = tokens if kept is None else taken(tokens, kept)
            tokens = run(layer, tokens, condition, text, checkpointed=self.activation_checkpointing)
            if self.router is not None and kept is not None and number == self.router.last:
                tokens, kept = restored(tokens, kept, whole), None
        return tokens.transpose(1, 2).unflatten(2, shape)
