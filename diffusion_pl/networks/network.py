"""What every network takes: noisy images, their noise level, and the condition."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.position import PositionEncoding
from diffusion_pl.networks.source import beside_source
from diffusion_pl.networks.text import Text, fitting


class Network(nn.Module):
    """The raw network F(c_in x; c_noise, condition); a subclass has `embed` and `denoise`.

    `embed(c_noise, **condition)` makes the embedding vector (B, length) of c_noise (B,) and those
    conditions that are given. `denoise(x, embedding)` makes the output of the image; that of a
    network with text also takes the texts, a `Text`.

    Args:
        resolution: H = W of the images it is built for.
        channels: image channels.
        classes: number of labels, 0 for none.
        halvings: how often an image is halved on its way down.
        augment: length of the augmentation label, 9 for EDM's pipe, 0 for none.
        position_frequencies: L of the position encoding that joins the image at the input; 0 for
            none.
        frame: side of the full-resolution grid that positions refer to; the resolution if None.
        text_width: E, channels of a text's token; 0 for a network that takes no text.
        text_length: L, tokens of the null, the text that stands for no text.
        image_channels: of a source image that the network takes beside the noisy one, such as a
            low-resolution one; 0 for a network that takes none.
        learned_variance: C output channels more, for the variance of the reverse steps.
        activation_checkpointing: keep only what passes between blocks in training; the backward
            pass runs every block again. Less memory for a third more time, the same numbers.

    Raises:
        UserError: a resolution that cannot be halved so often, image_channels below 0, or
            text_width without text_length.
    """

    embed: Callable[..., Tensor]
    denoise: Callable[..., Tensor]
    null_text: Tensor
    null_text_mask: Tensor
    null_text_known: Tensor

    def __init__(
        self,
        resolution: int,
        channels: int,
        classes: int,
        halvings: int,
        *,
        augment: int = 0,
        position_frequencies: int = 0,
        frame: int | None = None,
        text_width: int = 0,
        text_length: int = 0,
        image_channels: int = 0,
        learned_variance: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.classes = classes
        self.augment = augment
        self.activation_checkpointing = activation_checkpointing
        self.divisor = 2**halvings
        self.check_resolution(resolution, resolution)
        self.position = PositionEncoding(position_frequencies, frame or resolution)
        if image_channels < 0:
            raise UserError(f"image_channels must be at least 0 (got {image_channels})")
        self.image_channels = image_channels
        beside = image_channels + 1 if image_channels else 0  # the image and its mask
        self.in_channels = channels + self.position.channels + beside
        self.out_channels = 2 * channels if learned_variance else channels
        if text_width < 0 or text_length < 0 or (text_width == 0) != (text_length == 0):
            raise UserError(
                "text_width and text_length, channels and number of a text's tokens, must both be "
                f"at least 1, or both 0 (got {text_width} and {text_length})"
            )
        self.text_width, self.text_length = text_width, text_length
        self._null_is_set = False
        if text_width:
            self.register_buffer("null_text", torch.zeros(text_length, text_width))
            mask = torch.zeros(text_length, dtype=torch.bool)
            self.register_buffer("null_text_mask", mask)
            self.register_buffer("null_text_known", torch.tensor(False))

    def check_resolution(self, height: int, width: int) -> None:
        """Raise UserError unless the images can be halved as often as the network does."""
        if height % self.divisor or width % self.divisor:
            raise UserError(
                f"the network halves images {self.divisor.bit_length() - 1} times, so their sides "
                f"must be multiples of {self.divisor} (got {height} x {width})"
            )

    @torch.no_grad()
    def set_null_text(self, text: Tensor, mask: Tensor) -> None:
        """Say what stands for no text, the encoding of ""; it is kept with the weights.

        Args:
            text: token states (l, text_width), l at most text_length.
            mask: bool (l,), True where there is a token; there need be none, as with encoders that
                put no token of their own to a text: images without text then see no token at all.

        Raises:
            UserError: a network without text, or another shape.
        """
        length, width = self.text_length, self.text_width
        fits = text.shape == (*mask.shape, width) and 0 < len(text) <= length
        if not width or not fits or mask.dtype != torch.bool:
            raise UserError(
                f"the null text must have at most {length} tokens of {width} channels and a bool "
                f"mask, for a network with text_length: {length} and text_width: {width} (got "
                f"{tuple(text.shape)} and {mask.dtype} {tuple(mask.shape)})"
            )
        beyond = length - len(text)
        self.null_text.copy_(F.pad(torch.where(mask[:, None], text, 0), (0, 0, 0, beyond)))
        self.null_text_mask.copy_(F.pad(mask, (0, beyond)))
        self.null_text_known.fill_(True)

    def _text(self, text: Tensor | None, mask: Tensor | None, images: int) -> Text | None:
        """The texts of a batch, with the null where there is none, and zeros under the mask."""
        if (text is None) != (mask is None):
            raise UserError("text and text_mask must be given together, or neither")
        if not self.text_width:
            if text is not None:
                raise UserError("texts were given to a network without them (text_width: 0)")
            return None
        null, null_mask = self.null_text[None], self.null_text_mask[None]
        if text is None or mask is None:
            self._need_null(None)
            return Text(null.expand(images, -1, -1), null_mask.expand(images, -1))
        text, mask = fitting(text, mask, images, self.text_width)
        none = ~mask.any(dim=1, keepdim=True)
        self._need_null(none)
        more = self.text_length - text.shape[1]
        null, null_mask = (
            F.pad(null, (0, 0, 0, max(-more, 0))),
            F.pad(null_mask, (0, max(-more, 0))),
        )
        text, mask = F.pad(text, (0, 0, 0, max(more, 0))), F.pad(mask, (0, max(more, 0)))
        # Zeros, since a weight of 0 does not undo a number that is not finite.
        text = torch.where(mask[..., None], text.to(null.dtype), 0)
        return Text(torch.where(none[..., None], null, text), torch.where(none, null_mask, mask))

    def _need_null(self, none: Tensor | None) -> None:
        """Raise UserError if the null is needed and was never set."""
        if self._null_is_set or torch.compiler.is_compiling() or self.null_text_known.is_meta:
            return
        # Asked of the device until it is set, and not again.
        self._null_is_set = bool(self.null_text_known)
        if not self._null_is_set and (none is None or bool(none.any())):
            raise UserError(
                "the network was never told what stands for no text: train it on data with texts, "
                "or call set_null_text with the encoding of an empty text"
            )

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        *,
        position: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        **condition: Tensor | None,
    ) -> Tensor:
        """Apply the raw network F.

        Args:
            x: preconditioned noisy images (B, C, H, W), sides divisible by 2^halvings.
            c_noise: (B,), the noise level in the preconditioning's own coordinate: a timestep 0 to
                T - 1 (need not be whole), log(sigma) / 4, ...
            position: where the pixels lie in the full frame, in [0, 1], (B, 2, H, W) or
                (2, H, W); None where x is the whole image.
            text: token states of a frozen encoder, float (B, L, text_width), L of any length; None
                for no text.
            text_mask: bool (B, L), True where there is a token; a row of False is no text, for
                which the null stands. Numbers of `text` without a token never matter.
            source: an image to go by, (B, image_channels, H, W) in [-1, 1]; None for none.
            source_mask: bool (B, 1, H, W), True where a pixel of `source` is known; nowhere: no
                image. Other pixels of `source` never matter.
            condition: `label`, int64 (B,), 0 .. classes - 1, -1 for no label; `augment`, float
                (B, augment), zeros for no augmentation; None is as if not given.

        Returns:
            (B, C, H, W), or (B, 2 C, H, W) with `learned_variance`.

        Raises:
            UserError: a resolution that cannot be halved so often, a condition that the network
                does not take, or no text while the null was never set.
        """
        self.check_resolution(*x.shape[2:])
        given = {name: value for name, value in condition.items() if value is not None}
        if "label" in given and not self.classes:
            raise UserError("labels were given to a network without classes (classes: 0)")
        if "augment" in given and not self.augment:
            raise UserError("augmentation labels were given to a network with augment: 0")
        texts = self._text(text, text_mask, x.shape[0])
        beside = () if texts is None else (texts,)
        entry = beside_source(
            self.position(x, position), source, source_mask, x, self.image_channels
        )
        return self.denoise(entry, self.embed(c_noise, **given), *beside)
