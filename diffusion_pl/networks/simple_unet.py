"""The U-Net of simple diffusion (arXiv:2301.11093, sections 3.3 and 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.layers import double, halve, run
from diffusion_pl.networks.network import Network
from diffusion_pl.networks.residual import ResidualBlock
from diffusion_pl.networks.simple_layers import Condition, Head, Reduction, Stem, residual_block
from diffusion_pl.networks.text import Text
from diffusion_pl.networks.unet import enter_text


class SimpleUNet(Network):
    """A U-Net whose weight lies at 16 x 16: many blocks there, few channels at high resolution.

    1,114,809,347 parameters with the defaults for 128 pixels and 1000 classes. The settings are
    recalled, not verified; the paper's own count was not at hand.

    Args:
        resolution: H = W of the images it is built for; decides where attention and dropout are.
        model_channels: channels at multiplier 1, a multiple of 4.
        channel_mult: multiplier of each level, from the first down.
        blocks: residual blocks of each level in the encoder, as many in the decoder, which reads
            the encoder's one by one.
        attention: sides at which every block is followed by self-attention.
        heads: of the self-attention.
        dropout: probability at `dropout_from` pixels a side and below; above it none, since the
            finer details of an image are not what a large network learns by heart.
        dropout_from: the largest side with dropout.
        embedding_channels: length of the condition's vector.
        halvings: of the image before the first level, 1 for 256 and 2 for 512 pixels.
        reduction: how.
        channels, classes, position_frequencies, frame, activation_checkpointing, text_width,
            text_length, image_channels: as for every `Network`.

    Raises:
        UserError: a resolution that the levels do not divide, or blocks that do not fit them.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        classes: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 8, 8),
        blocks: Sequence[int] = (3, 4, 4, 12, 4),
        attention: Sequence[int] = (16, 8),
        heads: int = 4,
        dropout: float = 0.1,
        dropout_from: int = 16,
        embedding_channels: int = 1024,
        halvings: int = 0,
        reduction: Reduction = "wavelet",
        position_frequencies: int = 0,
        frame: int | None = None,
        activation_checkpointing: bool = False,
        text_width: int = 0,
        text_length: int = 0,
        image_channels: int = 0,
    ) -> None:
        if len(blocks) != len(channel_mult):
            raise UserError(
                f"blocks and channel_mult need a number for each level (got {len(blocks)} and "
                f"{len(channel_mult)})"
            )
        super().__init__(
            resolution, channels, classes, halvings + len(channel_mult) - 1,
            position_frequencies=position_frequencies, frame=frame,
            activation_checkpointing=activation_checkpointing,
            text_width=text_width, text_length=text_length, image_channels=image_channels,
        )  # fmt: skip
        self.condition = Condition(model_channels, embedding_channels, classes)
        self.stem = Stem(self.in_channels, model_channels, halvings, reduction)

        sizes = [resolution // 2 ** (halvings + level) for level in range(len(blocks))]
        widths = [model_channels * multiplier for multiplier in channel_mult]

        def block(channels_in: int, level: int) -> ResidualBlock:
            dropped = dropout if sizes[level] <= dropout_from else 0.0
            attends = heads if sizes[level] in attention else 0
            return residual_block(
                channels_in, widths[level], embedding_channels, dropped, attends, text_width
            )

        width, skips, encoder, decoder = model_channels, [], [], []
        for level, count in enumerate(blocks):
            here = []
            for _ in range(count):
                here.append(block(width, level))
                width = widths[level]
                skips.append(width)
            encoder.append(nn.ModuleList(here))
        first = residual_block(width, width, embedding_channels, dropout, heads, text_width)
        second = residual_block(width, width, embedding_channels, dropout)
        self.middle = nn.ModuleList([first, second])
        for level, count in reversed(list(enumerate(blocks))):
            here = []
            for _ in range(count):
                here.append(block(width + skips.pop(), level))
                width = widths[level]
            decoder.append(nn.ModuleList(here))
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.head = Head(width, channels, halvings, reduction)
        self.text = enter_text(self)

    def embed(self, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Embed the condition in float32, whatever autocast says, (B, embedding_channels)."""
        return self.condition(c_noise, label)

    def denoise(self, x: Tensor, embedding: Tensor, text: Text | None = None) -> Tensor:
        """The output of x (B, C + 4 position_frequencies, H, W) under an embedding and texts."""
        text = text.through(self.text) if text and self.text else None
        x = self.stem(x)
        skips = []
        for level, layers in enumerate(self.encoder):
            x = halve(x) if level else x
            for layer in layers.children():
                x = run(layer, x, embedding, text, checkpointed=self.activation_checkpointing)
                skips.append(x)
        for layer in self.middle:
            x = run(layer, x, embedding, text, checkpointed=self.activation_checkpointing)
        for level, layers in enumerate(self.decoder):
            x = double(x) if level else x
            for layer in layers.children():
                x = torch.cat([x, skips.pop()], dim=1)
                x = run(layer, x, embedding, text, checkpointed=self.activation_checkpointing)
        return self.head(x)
