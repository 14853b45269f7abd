"""ADM: the U-Net of Dhariwal & Nichol 2021 (arXiv:2105.05233) in EDM's form.

Karras 2022 (arXiv:2206.00364), Table 8; what its text leaves out is as in the released code.

| part | formula | where |
|---|---|---|
| embedding | sinusoids [cos, sin], augmentation, two layers, then + label | released code |
| block | norm1(h) (1 + scale) + shift, both from the embedding | Table 8, "adaptive scale" |
| heads | one for 64 channels | Table 8 |
| initial weights | U(+-1 / sqrt(fan in)), what begins near zero exactly 0 | released code |

U(+-1 / sqrt(fan in)) for weights and biases is what torch's layers begin with.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.networks.dropout import Dropout
from diffusion_pl.networks.layers import (
    PositionalEmbedding,
    SelfAttention,
    double,
    float32_region,
    group_norm,
    halve,
    one_hot,
)
from diffusion_pl.networks.unet import Place, UNet

HEAD_CHANNELS = 64
EPS = 1e-5  # of every normalisation
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def zero(layer: Layer) -> Layer:
    """Begin a layer at exactly zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """A residual block: norm, conv, scaled and shifted norm, dropout, conv, then attention.

    Args:
        channels_in: channels of x.
        channels_out: channels of the result.
        embedding: length of the embedding vector.
        dropout: probability, before the second convolution.
        attention: whether self-attention follows; under 64 channels it has no head and is left out.
        resample: `halve` or `double` to change the resolution in the block, or None.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        embedding: int,
        dropout: float,
        attention: bool = False,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.drop = Dropout(dropout)
        self.resample = resample
        self.norm0 = group_norm(channels_in, EPS)
        self.conv0 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * channels_out)
        self.norm1 = group_norm(channels_out, EPS)
        self.conv1 = zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        differ = channels_in != channels_out
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if differ else None
        self.attention = None
        heads = channels_out // HEAD_CHANNELS
        if attention and heads:
            self.attention = SelfAttention(group_norm(channels_out, EPS), heads)
            self.attention.qkv.reset_parameters()
            zero(self.attention.proj)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, channels_in, H, W), (B, embedding) -> (B, channels_out, H', W')."""
        hidden = self.conv0(self._resampled(F.silu(self.norm0(x))))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = torch.addcmul(shift, self.norm1(hidden), 1 + scale)
        hidden = self.drop(F.silu(hidden))
        x = self._resampled(x)
        x = self.conv1(hidden) + (x if self.skip is None else self.skip(x))
        return x if self.attention is None else self.attention(x)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return x
        return halve(x) if self.resample == "halve" else double(x)


class ADM(UNet):
    """ADM; by its defaults and 1,000 classes EDM's ImageNet-64 model, 295,899,267 parameters.

    Args:
        resolution: H = W of the images it is built for; decides which levels have attention.
        channels: image channels.
        classes: number of labels, 0 for none.
        augment: length of the augmentation label, 9 for EDM's pipe, 0 for none.
        model_channels: channels at multiplier 1.
        channel_mult: multiplier of each level, from the full resolution down.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        attention: resolutions whose blocks are each followed by self-attention.
        dropout: probability in every block.
        position_frequencies, frame, learned_variance, activation_checkpointing: as for every
            `Network`.

    Raises:
        UserError: a resolution that the levels do not divide.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        classes: int = 0,
        augment: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        position_frequencies: int = 0,
        frame: int | None = None,
        learned_variance: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            resolution, channels, classes, len(channel_mult) - 1,
            augment=augment, position_frequencies=position_frequencies, frame=frame,
            learned_variance=learned_variance,
            activation_checkpointing=activation_checkpointing,
        )  # fmt: skip
        self._make_embedding(model_channels, augment)
        make = partial(Block, embedding=4 * model_channels, dropout=dropout)
        widths = [model_channels * multiplier for multiplier in channel_mult]

        def block(channels_in: int, channels_out: int, level: int, place: Place) -> Block:
            return make(channels_in, channels_out, attention=resolution // 2**level in attention)

        self.stem = nn.Conv2d(self.in_channels, widths[0], 3, padding=1)
        self.encoder, self.middle, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width = self.fill(
            widths[0], widths, blocks, block,
            down=lambda width: make(width, width, resample="halve"),
            middle=lambda width: [make(width, width, attention=True), make(width, width)],
            up=lambda width: make(width, width, resample="double"),
        )  # fmt: skip
        self.out_norm = group_norm(width, EPS)
        self.out_conv = zero(nn.Conv2d(width, self.out_channels, 3, padding=1))

    def _make_embedding(self, noise: int, augment: int) -> None:
        length = 4 * noise
        self.map_noise = PositionalEmbedding(noise, endpoint=False)
        self.map_augment = zero(nn.Linear(augment, noise, bias=False)) if augment else None
        self.map_layer0 = nn.Linear(noise, length)
        self.map_layer1 = nn.Linear(length, length)
        self.map_label = nn.Linear(self.classes, length, bias=False) if self.classes else None
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def embed(
        self, c_noise: Tensor, label: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """Embed the condition in float32, whatever autocast says, (B, 4 model_channels)."""
        with float32_region(c_noise.device):
            vector = self.map_noise(c_noise)
            vector = vector.roll(vector.shape[1] // 2, dims=1)  # [cos, sin] here
            if augment is not None:
                assert self.map_augment is not None  # `forward` sees to it
                vector = vector + self.map_augment(augment)
            vector = self.map_layer1(F.silu(self.map_layer0(vector)))
            if label is not None:
                assert self.map_label is not None  # `forward` sees to it
                vector = vector + self.map_label(one_hot(label, self.classes))
            return F.silu(vector)

    def denoise(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The output of x (B, C + 4 position_frequencies, H, W) under an embedding."""
        x = self.decode(self.encode(self.stem(x), embedding), embedding)
        return self.out_conv(F.silu(self.out_norm(x)))
