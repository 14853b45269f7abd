"""The U-Net's skeleton: levels down, a middle, and levels up whose blocks take the skips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.layers import run
from diffusion_pl.networks.network import Network
from diffusion_pl.networks.text import Text

# Where a block stands: in the encoder, in the decoder, or last in a level of the decoder.
Place = Literal["encoder", "decoder", "last"]


class MakesBlock(Protocol):
    """Makes a residual block of a level, 0 at the full resolution."""

    def __call__(
        self, channels_in: int, channels_out: int, level: int, place: Place, /
    ) -> nn.Module: ...


class UNet(Network):
    """A stem, an encoder, a middle, a decoder and an output; a subclass makes them (`fill`).

    A text enters every attention, each token normalised to mean 0 and variance 1.
    """

    text: nn.Module | None
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

        Raises:
            UserError: text in a network without attention.
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
        self.text = enter_text(self)
        return width

    def encode(self, x: Tensor, embedding: Tensor, text: Text | None = None) -> list[Tensor]:
        """Apply the stem and the encoder and keep what the decoder takes, every layer's output."""
        x = self.stem(x)
        skips = [x]
        for layer in self.encoder:
            x = run(layer, x, embedding, text, checkpointed=self.activation_checkpointing)
            skips.append(x)
        return skips

    def decode(self, skips: list[Tensor], embedding: Tensor, text: Text | None = None) -> Tensor:
        """Apply the middle, then the decoder, whose blocks take the skips, the last one first.

        Args:
            skips: as `encode` keeps them; used up.
            embedding: (B, length).
            text: for the attention, None for none.
        """
        x = skips[-1]
        for layer in self.middle:
            x = run(layer, x, embedding, text, checkpointed=self.activation_checkpointing)
        for layer in self.decoder:
            if layer.resample is None:
                x = self.join(x, skips.pop())
            x = run(layer, x, embedding, text, checkpointed=self.activation_checkpointing)
        return x

    def denoise(self, x: Tensor, embedding: Tensor, text: Text | None = None) -> Tensor:
        """The output of x (B, in_channels, H, W) under an embedding and texts."""
        text = text.through(self.text) if text and self.text else None
        x = self.decode(self.encode(x, embedding, text), embedding, text)
        return self.out_conv(F.silu(self.out_norm(x)))

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """Put a skip beside x."""
        return torch.cat([x, skip], dim=1)


def enter_text(network: Network) -> nn.Module | None:
    """What a network of convolutions normalises a text's tokens by; None for one without text.

    It has no weights, since every attention has a linear map of its own behind it.

    Raises:
        UserError: text in a network without attention.
    """
    if not network.text_width:
        return None
    if not any(isinstance(getattr(part, "text", None), nn.Module) for part in network.modules()):
        raise UserError(
            "text enters where a network attends, and this one attends nowhere; set attention, or "
            "text_width: 0"
        )
    return nn.LayerNorm(network.text_width, elementwise_affine=False)
