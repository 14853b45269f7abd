"""The U-Net's skeleton: levels down, a middle, and levels up whose blocks take the skips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.networks.layers import run
from diffusion_pl.networks.network import Network

# Where a block stands: in the encoder, in the decoder, or last in a level of the decoder.
Place = Literal["encoder", "decoder", "last"]


class MakesBlock(Protocol):
    """Makes a residual block of a level, 0 at the full resolution."""

    def __call__(
        self, channels_in: int, channels_out: int, level: int, place: Place, /
    ) -> nn.Module: ...


class UNet(Network):
    """A stem, an encoder, a middle, a decoder and an output; a subclass makes them (`fill`)."""

    stem: nn.Module
    encoder: nn.ModuleList
    middle: nn.ModuleList
    decoder: nn.ModuleList
    out_norm: nn.Module
    out_conv: nn.Module

    def fill(
        self,
        width: int,
        widths: Sequence[int],
        blocks: int,
        block: MakesBlock,
        down: Callable[[int], nn.Module],
        middle: Callable[[int], Sequence[nn.Module]],
        up: Callable[[int], nn.Module],
    ) -> int:
        """Make the layers of the three lists, from the image down and up again.

        Args:
            width: channels that enter the encoder.
            widths: of each level, from the full resolution down.
            blocks: of a level of the encoder; the decoder has one more.
            block: makes a residual block.
            down: makes what halves the resolution, at a width.
            middle: makes the layers of the middle, at a width.
            up: makes what doubles the resolution, at a width; it has `resample`, blocks have none.

        Returns:
            The channels that leave the decoder.
        """
        skips = [width]
        for level, wanted in enumerate(widths):
            if level:
                self.encoder.append(down(width))
                skips.append(width)
            for _ in range(blocks):
                self.encoder.append(block(width, wanted, level, "encoder"))
                width = wanted
                skips.append(width)
        self.middle.extend(middle(width))
        for level, wanted in reversed(list(enumerate(widths))):
            for number in range(blocks + 1):
                place: Place = "last" if number == blocks else "decoder"
                self.decoder.append(block(width + skips.pop(), wanted, level, place))
                width = wanted
            if level:
                self.decoder.append(up(width))
        return width

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """Apply the stem and the encoder and keep what the decoder takes, every layer's output."""
        x = self.stem(x)
        skips = [x]
        for layer in self.encoder:
            x = run(layer, x, embedding, checkpointed=self.activation_checkpointing)
            skips.append(x)
        return skips

    def decode(self, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """Apply the middle, then the decoder, whose blocks take the skips, the last one first.

        Args:
            skips: as `encode` keeps them; used up.
            embedding: (B, length).
        """
        x = skips[-1]
        for layer in self.middle:
            x = run(layer, x, embedding, checkpointed=self.activation_checkpointing)
        for layer in self.decoder:
            if layer.resample is None:
                x = self.join(x, skips.pop())
            x = run(layer, x, embedding, checkpointed=self.activation_checkpointing)
        return x

    def denoise(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The output of x (B, C + 4 position_frequencies, H, W) under an embedding."""
        x = self.decode(self.encode(x, embedding), embedding)
        return self.out_conv(F.silu(self.out_norm(x)))

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """Put a skip beside x."""
        return torch.cat([x, skip], dim=1)
