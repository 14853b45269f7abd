"""EDM2's U-Net: Karras, Aittala, Lehtinen, Hellsten, Aila & Laine, Analyzing and Improving the
Training Dynamics of Diffusion Models, 2024, arXiv:2312.02696; its config G.

| part | formula | where |
|---|---|---|
| layers | magnitude-preserving, see edm2_layers.py | App. B |
| embedding | mp_silu(mp_sum(noise, label, 0.5)), the label one-hot times sqrt(classes) | Fig. 21 |
| encoder's block | x to its width, pixel norm, then the residual branch | Fig. 21 |
| residual branch | conv(drop(mp_silu(conv(mp_silu x) (1 + gain linear(embedding))))) | Fig. 21 |
| sums | 0.3 of what a branch adds, for residuals and attention | section 2.5 |
| skips | mp_cat at 0.5 | section 2.5 |
| input | a channel of ones beside the image, for there are no biases | section 2.3 |
| output | gain conv(x), the gain 0 at first | section 2.3 |
| clip | activations within +-256, so that fp16 does not overflow | released code |

Held against the released code; the places in the paper are cited from memory, and in doubt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion_pl.networks.dropout import Dropout
from diffusion_pl.networks.edm2_layers import (
    CosineAttention,
    UnitFourier,
    UnitLayer,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
)
from diffusion_pl.networks.layers import float32_region, one_hot
from diffusion_pl.networks.song_layers import Resample
from diffusion_pl.networks.text import Text
from diffusion_pl.networks.unet import Place, UNet


class Block(nn.Module):
    """A residual block of either side, with attention if asked.

    Args:
        channels_in: channels of x.
        channels_out: channels of the result.
        embedding: length of the embedding vector.
        decoder: whether x goes to the residual branch as it comes; else it is first brought to
            its width and normalised.
        dropout: probability, before the second convolution.
        attention: whether self-attention follows; under `head_channels` channels it has no head
            and is left out.
        resample: to change the resolution before all else, or None.
        taps: of the resampling filter.
        balance: share of the residual branch in the sum.
        attention_balance: share of the attention in its sum.
        head_channels: channels of a head.
        clip: largest magnitude of an activation, None for no limit.
        text_width: channels of a text's token, 0 for no text.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        embedding: int,
        decoder: bool,
        dropout: float,
        attention: bool = False,
        resample: Literal["halve", "double"] | None = None,
        taps: Sequence[int] = (1, 1),
        balance: float = 0.3,
        attention_balance: float = 0.3,
        head_channels: int = 64,
        clip: float | None = 256.0,
        text_width: int = 0,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.balance = balance
        self.clip = clip
        self.drop = Dropout(dropout)
        self.resample = None if resample is None else Resample(resample, taps)
        self.conv0 = UnitLayer(channels_in if decoder else channels_out, channels_out, 3)
        self.affine = UnitLayer(embedding, channels_out)
        self.affine_gain = nn.Parameter(torch.zeros(1))
        self.conv1 = UnitLayer(channels_out, channels_out, 3)
        differ = channels_in != channels_out
        self.skip = UnitLayer(channels_in, channels_out, 1) if differ else None
        self.attention = None
        heads = channels_out // head_channels
        if attention and heads:
            self.attention = CosineAttention(channels_out, heads, attention_balance, text_width)

    def forward(self, x: Tensor, embedding: Tensor, text: Text | None = None) -> Tensor:
        """(B, channels_in, H, W), (B, embedding) -> (B, channels_out, H', W')."""
        if self.resample is not None:
            x = self.resample(x)
        if not self.decoder:
            x = normalize(x if self.skip is None else self.skip(x), (1,))
        hidden = self.conv0(mp_silu(x))
        scale = 1 + self.affine(embedding, self.affine_gain)[:, :, None, None]
        hidden = self.drop(mp_silu(hidden * scale.to(hidden.dtype)))
        hidden = self.conv1(hidden)
        if self.decoder and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, hidden, self.balance)
        if self.attention is not None:
            x = self.attention(x, text)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


class EDM2UNet(UNet):
    """EDM2's network; with 1,000 classes and 64 pixels EDM2-S, 280,209,253 parameters.

    Who trains it calls `begin_step` before every optimizer step; `DiffusionModule` does.

    Args:
        resolution: H = W of the images it is built for; decides which levels have attention.
        model_channels: channels at multiplier 1: 128, 192, 256, 320, 384 are XS, S, M, L, XL.
        channel_mult: multiplier of each level, from the full resolution down.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        attention: resolutions whose blocks are each followed by self-attention.
        dropout: probability in every block.
        noise_mult: Fourier features of the noise level, in model_channels; the first level's
            width if None.
        embedding_mult: length of the embedding, in model_channels; the widest level's if None.
        label_balance: share of the label in the embedding.
        concat_balance: share of the skip connections.
        residual_balance: share of the residual branch in a block.
        attention_balance: share of the attention in a block.
        head_channels: channels of an attention head.
        clip: largest magnitude of a block's output, None for no limit.
        resample_filter: taps of the filter between levels.
        channels, classes, position_frequencies, frame, learned_variance, activation_checkpointing,
            text_width, text_length, image_channels: as for every `Network`.

    Raises:
        UserError: text without attention, a resolution that the levels do not divide, a filter of
            odd length, or channels that do not divide over the heads.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        classes: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (16, 8),
        dropout: float = 0.0,
        noise_mult: int | None = None,
        embedding_mult: int | None = None,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        residual_balance: float = 0.3,
        attention_balance: float = 0.3,
        head_channels: int = 64,
        clip: float | None = 256.0,
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
            position_frequencies=position_frequencies, frame=frame,
            learned_variance=learned_variance,
            activation_checkpointing=activation_checkpointing,
            text_width=text_width, text_length=text_length, image_channels=image_channels,
        )  # fmt: skip
        self.label_balance = label_balance
        self.concat_balance = concat_balance
        widths = [model_channels * multiplier for multiplier in channel_mult]
        features = widths[0] if noise_mult is None else model_channels * noise_mult
        length = max(widths) if embedding_mult is None else model_channels * embedding_mult
        self.fourier = UnitFourier(features)
        self.map_noise = UnitLayer(features, length)
        self.map_label = UnitLayer(classes, length) if classes else None

        make = partial(
            Block, embedding=length, dropout=dropout, taps=tuple(resample_filter),
            balance=residual_balance, attention_balance=attention_balance,
            head_channels=head_channels, clip=clip, text_width=text_width,
        )  # fmt: skip

        def block(channels_in: int, channels_out: int, level: int, place: Place) -> Block:
            attends = resolution // 2**level in attention
            decoder = place != "encoder"
            return make(channels_in, channels_out, decoder=decoder, attention=attends)

        self.stem = UnitLayer(self.in_channels + 1, widths[0], 3)
        self.encoder, self.middle, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width = self.fill(
            widths[0], widths, blocks, block,
            down=lambda width: make(width, width, decoder=False, resample="halve"),
            middle=lambda width: [
                make(width, width, decoder=True, attention=attends) for attends in (True, False)
            ],
            up=lambda width: make(width, width, decoder=True, resample="double"),
        )  # fmt: skip
        self.out_conv = UnitLayer(width, self.out_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros(1))

    def begin_step(self) -> None:
        """Normalise the stored weights, before an optimizer step's first micro-batch (Eq. 66).

        The function is the same; without it weights grow under steps that are at right angles to
        them, and the learning rate shrinks with that.
        """
        for layer in self.modules():
            if isinstance(layer, UnitLayer):
                layer.force()

    def end_step(self) -> None:
        """Nothing: the averages take the weights as the optimizer leaves them."""

    def embed(self, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Embed the condition in float32, whatever autocast says, (B, length)."""
        with float32_region(c_noise.device):
            vector = self.map_noise(self.fourier(c_noise))
            if self.map_label is not None:
                if label is None:
                    label = torch.full(c_noise.shape, -1, device=c_noise.device)
                # No label is a row of zeros, which still takes its share of the sum.
                hot = one_hot(label, self.classes).to(vector.dtype) * math.sqrt(self.classes)
                vector = mp_sum(vector, self.map_label(hot), self.label_balance)
            return mp_silu(vector)

    def denoise(self, x: Tensor, embedding: Tensor, text: Text | None = None) -> Tensor:
        """The output of x (B, in_channels, H, W) under an embedding and texts."""
        text = text.through(self.text) if text and self.text else None
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = self.decode(self.encode(x, embedding, text), embedding, text)
        return self.out_conv(x, self.out_gain)

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """Put a skip beside x, at the magnitude of both."""
        return mp_cat(x, skip, t=self.concat_balance)
