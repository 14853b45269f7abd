"""DDPM++ and NCSN++: the U-Nets of Song 2021 (arXiv:2011.13456) in EDM's form.

Karras 2022 (arXiv:2206.00364), Table 8; what its text leaves out is as in the released code.

| part | DDPM++ | NCSN++ |
|---|---|---|
| embedding | sinusoids, geometric frequencies | sinusoids, random frequencies of scale 16 |
| noise_mult | 1 | 2 |
| encoder | standard | residual: a halved image joins each level |
| resample_filter | [1, 1] | [1, 3, 3, 1] |
| parameters, CIFAR-10, augmentation labels | 55,733,891 | 56,397,827 |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.layers import (
    PositionalEmbedding,
    decode,
    float32_region,
    group_norm,
    one_hot,
    refuse_resolution,
    run,
    xavier,
)
from diffusion_pl.networks.position import PositionEncoding
from diffusion_pl.networks.song_layers import (
    SKIP_SCALE,
    AuxiliaryHalving,
    Block,
    FourierEmbedding,
)


class SongUNet(nn.Module):
    """DDPM++ by its defaults; NCSN++ by the last three of the network's options.

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
        embedding: frequencies of the noise embedding, geometric or random.
        noise_mult: size of the noise embedding, in model_channels.
        encoder: "residual" adds the image, halved by learned convolutions, to every lower level.
        resample_filter: taps of the filter between levels.
        octaves: L of the position encoding that joins the image at the input, 0 for none.
        frame: side of the full-resolution grid that positions refer to; the resolution if None.
        variance: put out C channels more, what the network says of the reverse variance.
        recompute: keep only what passes between blocks in training; the backward pass runs every
            block again. Less memory for a third more time, the same numbers.

    Raises:
        UserError: a resolution that the levels do not divide, or a filter of odd length.
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
        embedding: Literal["positional", "fourier"] = "positional",
        noise_mult: int = 1,
        encoder: Literal["standard", "residual"] = "standard",
        resample_filter: Sequence[int] = (1, 1),
        octaves: int = 0,
        frame: int | None = None,
        variance: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.channels = channels
        self.recompute = recompute
        self.divisor = 2 ** (len(channel_mult) - 1)
        self.check_resolution(resolution, resolution)
        self._make_embedding(embedding, noise_mult * model_channels, 4 * model_channels, augment)

        make = partial(
            Block, embedding=4 * model_channels, dropout=dropout, taps=tuple(resample_filter)
        )
        widths = [model_channels * multiplier for multiplier in channel_mult]
        sizes = [resolution // 2**level for level in range(len(widths))]

        self.position = PositionEncoding(octaves, frame or resolution)
        auxiliary = channels + self.position.channels
        self.stem = xavier(nn.Conv2d(auxiliary, model_channels, 3, padding=1))
        width = model_channels
        skips = [width]
        self.encoder = nn.ModuleList()
        self.auxiliary = nn.ModuleList()  # one a halving in a residual encoder, else empty
        for level, (wanted, size) in enumerate(zip(widths, sizes, strict=True)):
            if level:
                self.encoder.append(make(width, width, resample="halve"))
                skips.append(width)
                if encoder == "residual":
                    self.auxiliary.append(AuxiliaryHalving(auxiliary, width, resample_filter))
                    auxiliary = width
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
        told = 2 * channels if variance else channels
        self.out_conv = xavier(nn.Conv2d(width, told, 3, padding=1), gain=1e-5)

    def _make_embedding(self, kind: str, noise: int, length: int, augment: int) -> None:
        fourier = kind == "fourier"
        self.map_noise = FourierEmbedding(noise) if fourier else PositionalEmbedding(noise)
        self.map_label = xavier(nn.Linear(self.classes, noise)) if self.classes else None
        self.map_augment = xavier(nn.Linear(augment, noise, bias=False)) if augment else None
        self.map_layer0 = xavier(nn.Linear(noise, length))
        self.map_layer1 = xavier(nn.Linear(length, length))

    def check_resolution(self, height: int, width: int) -> None:
        """Raise ValueError unless the images can be halved once a level."""
        refuse_resolution(height, width, self.divisor)

    def embed(self, c_noise: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """Embed the condition in float32, whatever autocast says, (B, 4 model_channels).

        Raises:
            UserError: labels or augmentation labels given to a network without them.
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
                raise UserError("labels were given to a network without classes (classes: 0)")
            if augment is not None:
                if self.map_augment is None:
                    raise UserError("augmentation labels were given to a network with augment: 0")
                vector = vector + self.map_augment(augment)
            return F.silu(self.map_layer1(F.silu(self.map_layer0(vector))))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        *,
        label: Tensor | None = None,
        augment: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Apply the raw network F.

        Args:
            x: preconditioned noisy images (B, C, H, W), sides divisible by 2^(levels - 1).
            c_noise: (B,), the noise level in the preconditioning's own coordinate.
            label: int64 (B,), 0 .. classes - 1, -1 for no label.
            augment: float (B, augment); zeros or None for no augmentation.
            position: where the pixels lie in the full frame, in [0, 1], (B, 2, H, W) or
                (2, H, W); None where x is the whole image.

        Returns:
            (B, C, H, W), or (B, 2 C, H, W) with `variance`.

        Raises:
            UserError: a resolution that the levels do not divide, or a condition it does not take.
        """
        self.check_resolution(*x.shape[2:])
        embedding = self.embed(c_noise, label, augment)
        auxiliary = self.position(x, position)
        x = self.stem(auxiliary)
        skips, halvings = [x], iter(self.auxiliary)
        for block in self.encoder:
            x = run(block, x, embedding, recompute=self.recompute)
            if self.auxiliary and block.resample is not None:
                x = auxiliary = (x + next(halvings)(auxiliary)) * SKIP_SCALE
            skips.append(x)
        x = decode(self.middle, self.decoder, skips, embedding, recompute=self.recompute)
        return self.out_conv(F.silu(self.out_norm(x)))
