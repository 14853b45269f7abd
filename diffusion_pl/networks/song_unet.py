"""DDPM++: the U-Net of Song 2021 (arXiv:2011.13456) in EDM's form (Karras 2022, Table 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.networks.layers import (
    PositionalEmbedding,
    SelfAttention,
    double,
    float32_region,
    group_norm,
    halve,
    one_hot,
    refuse_resolution,
    xavier,
)

SKIP_SCALE = math.sqrt(0.5)  # the sum of two unit-variance branches keeps unit variance


class Block(nn.Module):
    """A residual block: norm, conv, + embedding, norm, dropout, conv, then attention if asked.

    Args:
        channels_in: channels of x.
        channels_out: channels of the result.
        embedding: length of the embedding vector.
        dropout: probability, before the second convolution.
        attention: whether self-attention follows.
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
        self.resample = resample
        self.norm0 = group_norm(channels_in)
        self.conv0 = xavier(nn.Conv2d(channels_in, channels_out, 3, padding=1))
        self.affine = xavier(nn.Linear(embedding, channels_out))
        self.norm1 = group_norm(channels_out)
        self.conv1 = xavier(nn.Conv2d(channels_out, channels_out, 3, padding=1), gain=1e-5)
        # A resampled skip has its own 1x1 convolution even where the channels agree (Table 8).
        projected = channels_in != channels_out or resample is not None
        self.skip = xavier(nn.Conv2d(channels_in, channels_out, 1)) if projected else None
        self.attention = None
        if attention:
            self.attention = SelfAttention(
                group_norm(channels_out), scale=SKIP_SCALE, gain=math.sqrt(0.2)
            )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, channels_in, H, W), (B, embedding) -> (B, channels_out, H', W')."""
        hidden = self._resampled(F.silu(self.norm0(x)))
        hidden = self.conv0(hidden) + self.affine(embedding)[:, :, None, None]
        hidden = F.dropout(F.silu(self.norm1(hidden)), self.dropout, self.training)
        hidden = self.conv1(hidden)
        x = self._resampled(x)
        x = (hidden + (x if self.skip is None else self.skip(x))) * SKIP_SCALE
        return x if self.attention is None else self.attention(x)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return x
        return halve(x) if self.resample == "halve" else double(x)


class SongUNet(nn.Module):
    """The DDPM++ U-Net; at the published CIFAR-10 settings 55,733,891 parameters.

    Args:
        resolution: H = W of the images it is built for; decides which levels have attention.
        channels: image channels.
        classes: number of labels, 0 for none.
        augment: length of the augmentation label, 9 for EDM's pipe, 0 for none.
        model_channels: channels at multiplier 1.
        channel_mult: multiplier of each level, from the full resolution down.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        attention: resolutions whose levels have self-attention.
        dropout: probability in every block.

    Raises:
        ValueError: a resolution that the levels do not divide.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        classes: int = 0,
        augment: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.channels = channels
        self.divisor = 2 ** (len(channel_mult) - 1)
        self.check_resolution(resolution, resolution)
        embedding = 4 * model_channels
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_label = xavier(nn.Linear(classes, model_channels)) if classes else None
        self.map_augment = (
            xavier(nn.Linear(augment, model_channels, bias=False)) if augment else None
        )
        self.map_layer0 = xavier(nn.Linear(model_channels, embedding))
        self.map_layer1 = xavier(nn.Linear(embedding, embedding))

        make = partial(Block, embedding=embedding, dropout=dropout)
        widths = [model_channels * multiplier for multiplier in channel_mult]
        sizes = [resolution // 2**level for level in range(len(widths))]

        self.stem = xavier(nn.Conv2d(channels, model_channels, 3, padding=1))
        width = model_channels
        skips = [width]
        self.encoder = nn.ModuleList()
        for level, (wanted, size) in enumerate(zip(widths, sizes, strict=True)):
            if level:
                self.encoder.append(make(width, width, resample="halve"))
                skips.append(width)
            for _ in range(blocks):
                attends = size in attention
                self.encoder.append(make(width, wanted, attention=attends))
                width = wanted
                skips.append(width)

        self.middle = nn.ModuleList([make(width, width, attention=True), make(width, width)])
        # Blocks that take a skip, and between levels one that doubles the resolution.
        self.decoder = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for block in range(blocks + 1):
                # Attention only in the last block of a level, unlike the encoder.
                attends = block == blocks and sizes[level] in attention
                joined = width + skips.pop()
                self.decoder.append(make(joined, widths[level], attention=attends))
                width = widths[level]
            if level:
                self.decoder.append(make(width, width, resample="double"))
        self.out_norm = group_norm(width)
        self.out_conv = xavier(nn.Conv2d(width, channels, 3, padding=1), gain=1e-5)

    def check_resolution(self, height: int, width: int) -> None:
        """Raise ValueError unless the images can be halved once a level."""
        refuse_resolution(height, width, self.divisor)

    def embed(self, c_noise: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """Embed the condition in float32, whatever autocast says, (B, 4 model_channels).

        Raises:
            ValueError: labels or augmentation labels given to a network without them.
        """
        with float32_region(c_noise.device):
            vector = self.map_noise(c_noise)
            if self.map_label is not None and label is not None:
                # Scaled to unit mean square, as the noise embedding is.
                hot = one_hot(label, self.classes) * math.sqrt(self.classes)
                vector = vector + self.map_label(hot)
            elif self.map_label is not None:
                vector = vector + self.map_label.bias
            elif label is not None:
                raise ValueError("labels were given to a network without classes (classes: 0)")
            if augment is not None:
                if self.map_augment is None:
                    raise ValueError("augmentation labels were given to a network with augment: 0")
                vector = vector + self.map_augment(augment)
            return F.silu(self.map_layer1(F.silu(self.map_layer0(vector))))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        *,
        label: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Apply the raw network F.

        Args:
            x: preconditioned noisy images (B, C, H, W), sides divisible by 2^(levels - 1).
            c_noise: (B,), the noise level in the preconditioning's own coordinate.
            label: int64 (B,), 0 .. classes - 1, -1 for no label.
            augment: float (B, augment); zeros or None for no augmentation.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: a resolution that the levels do not divide, or a condition it does not take.
        """
        self.check_resolution(*x.shape[2:])
        embedding = self.embed(c_noise, label, augment)
        x = self.stem(x)
        skips = [x]
        for block in self.encoder:
            x = block(x, embedding)
            skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for block in self.decoder:
            if block.resample is None:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, embedding)
        return self.out_conv(F.silu(self.out_norm(x)))
