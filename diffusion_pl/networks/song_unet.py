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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.networks.layers import (
    PositionalEmbedding,
    SelfAttention,
    float32_region,
    group_norm,
    one_hot,
    run,
    xavier,
)
from diffusion_pl.networks.residual import ZERO, ResidualBlock
from diffusion_pl.networks.song_layers import AuxiliaryHalving, FourierEmbedding, Resample
from diffusion_pl.networks.text import Text
from diffusion_pl.networks.unet import Place, UNet

SKIP_SCALE = math.sqrt(0.5)  # the sum of two unit-variance branches keeps unit variance


class SongUNet(UNet):
    """DDPM++ by its defaults; NCSN++ by the last three of the network's options.

    Args:
        resolution: H = W of the images it is built for; decides which levels have attention.
        model_channels: channels at multiplier 1.
        channel_mult: multiplier of each level, from the full resolution down.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        attention: resolutions whose levels have self-attention.
        dropout: probability in every block.
        embedding: frequencies of the noise embedding, geometric or random.
        noise_mult: size of the noise embedding, in model_channels.
        encoder: "residual" adds the image, halved by learned convolutions, to every lower level.
        resample_filter: taps of the filter between levels.
        channels, classes, augment, position_frequencies, frame, learned_variance,
            activation_checkpointing, text_width, text_length, image_channels: as for every
            `Network`.

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
        position_frequencies: int = 0,
        frame: int | None = None,
        learned_variance: bool = False,
        activation_checkpointing: bool = False,
        text_width: int = 0,
        text_length: int = 0,
        image_channels: int = 0,
    ) -> None:
        super().__init__(
            resolution, channels, classes, len(channel_mult) - 1,
            augment=augment, position_frequencies=position_frequencies, frame=frame,
            learned_variance=learned_variance,
            activation_checkpointing=activation_checkpointing,
            text_width=text_width, text_length=text_length, image_channels=image_channels,
        )  # fmt: skip
        self._make_embedding(embedding, noise_mult * model_channels, 4 * model_channels, augment)
        # A resampled x has its own 1x1 convolution even where the channels agree (Table 8).
        make: Callable[..., ResidualBlock] = partial(
            ResidualBlock, embedding=4 * model_channels, dropout=dropout, scale=SKIP_SCALE,
            project_resampled=True,
        )  # fmt: skip
        attend = partial(
            SelfAttention, scale=SKIP_SCALE, gain=math.sqrt(0.2), text_width=text_width
        )
        resample = partial(Resample, taps=tuple(resample_filter))

        def block(channels_in: int, channels_out: int, level: int, place: Place) -> ResidualBlock:
            # In the decoder only the last block of a level attends.
            attends = place != "decoder" and resolution // 2**level in attention
            return make(channels_in, channels_out, attention=attend if attends else None)

        auxiliary = self.in_channels

        def down(width: int) -> ResidualBlock:
            nonlocal auxiliary
            halving = make(width, width, resample=resample("halve"))
            if encoder == "residual":
                self.auxiliary.append(AuxiliaryHalving(auxiliary, width, resample_filter))
                auxiliary = width
            return halving

        self.stem = xavier(nn.Conv2d(self.in_channels, model_channels, 3, padding=1))
        self.encoder = nn.ModuleList()
        self.auxiliary = nn.ModuleList()  # one a halving in a residual encoder, else empty
        self.middle, self.decoder = nn.ModuleList(), nn.ModuleList()
        width = self.fill(
            model_channels, [model_channels * multiplier for multiplier in channel_mult],
            blocks, block, down,
            middle=lambda width: [make(width, width, attention=attend), make(width, width)],
            up=lambda width: make(width, width, resample=resample("double")),
        )  # fmt: skip
        self.out_norm = group_norm(width)
        self.out_conv = xavier(nn.Conv2d(width, self.out_channels, 3, padding=1), ZERO)

    def _make_embedding(self, kind: str, noise: int, length: int, augment: int) -> None:
        fourier = kind == "fourier"
        self.map_noise = FourierEmbedding(noise) if fourier else PositionalEmbedding(noise)
        self.map_label = xavier(nn.Linear(self.classes, noise)) if self.classes else None
        self.map_augment = xavier(nn.Linear(augment, noise, bias=False)) if augment else None
        self.map_layer0 = xavier(nn.Linear(noise, length))
        self.map_layer1 = xavier(nn.Linear(length, length))

    def embed(
        self, c_noise: Tensor, label: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """Embed the condition in float32, whatever autocast says, (B, 4 model_channels)."""
        with float32_region(c_noise.device):
            vector = self.map_noise(c_noise)
            if label is not None:
                assert self.map_label is not None  # `forward` sees to it
                # Scaled to unit mean square, as the noise embedding is.
                hot = one_hot(label, self.classes) * math.sqrt(self.classes)
                vector = vector + self.map_label(hot)
            elif self.map_label is not None:
                vector = vector + self.map_label.bias
            if augment is not None:
                assert self.map_augment is not None  # `forward` sees to it
                vector = vector + self.map_augment(augment)
            return F.silu(self.map_layer1(F.silu(self.map_layer0(vector))))

    def encode(self, x: Tensor, embedding: Tensor, text: Text | None = None) -> list[Tensor]:
        """As every U-Net; in a residual encoder the halved image joins each lower level."""
        auxiliary = x
        x = self.stem(x)
        skips, halvings = [x], iter(self.auxiliary)
        for block in self.encoder:
            x = run(block, x, embedding, text, checkpointed=self.activation_checkpointing)
            if self.auxiliary and block.resample is not None:
                x = auxiliary = (x + next(halvings)(auxiliary)) * SKIP_SCALE
            skips.append(x)
        return skips
