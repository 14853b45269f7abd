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

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.networks.layers import (
    Layer,
    PositionalEmbedding,
    SelfAttention,
    double,
    float32_region,
    group_norm,
    halve,
    one_hot,
    zero,
)
from diffusion_pl.networks.residual import ResidualBlock
from diffusion_pl.networks.unet import Place, UNet

HEAD_CHANNELS = 64
EPS = 1e-5  # of every normalisation


def initialise(layer: Layer, gain: float = 1.0) -> Layer:
    """As torch's layers begin; exactly zero where other papers have a small gain."""
    return layer if gain == 1 else zero(layer)


def attend(norm: nn.GroupNorm, text_width: int = 0) -> SelfAttention | None:
    """Self-attention; under 64 channels it has no head and is left out."""
    heads = norm.num_channels // HEAD_CHANNELS
    if not heads:
        return None
    attention = SelfAttention(norm, heads, text_width=text_width)
    attention.qkv.reset_parameters()
    zero(attention.proj)
    return attention


class ADM(UNet):
    """ADM; by its defaults and 1,000 classes EDM's ImageNet-64 model, 295,899,267 parameters.

    Args:
        resolution: H = W of the images it is built for; decides which levels have attention.
        model_channels: channels at multiplier 1.
        channel_mult: multiplier of each level, from the full resolution down.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        attention: resolutions whose blocks are each followed by self-attention.
        dropout: probability in every block.
        channels, classes, augment, position_frequencies, frame, learned_variance,
            activation_checkpointing, text_width, text_length, image_channels: as for every
            `Network`.

    Raises:
        UserError: text without attention, a resolution that the levels do not divide.
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
        self._make_embedding(model_channels, augment)
        make: Callable[..., ResidualBlock] = partial(
            ResidualBlock, embedding=4 * model_channels, dropout=dropout, adaptive_scale=True,
            norm=partial(group_norm, eps=EPS), initialise=initialise,
        )  # fmt: skip
        widths = [model_channels * multiplier for multiplier in channel_mult]
        attending = partial(attend, text_width=text_width)

        def block(channels_in: int, channels_out: int, level: int, place: Place) -> ResidualBlock:
            attends = resolution // 2**level in attention
            return make(channels_in, channels_out, attention=attending if attends else None)

        self.stem = nn.Conv2d(self.in_channels, widths[0], 3, padding=1)
        self.encoder, self.middle, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width = self.fill(
            widths[0], widths, blocks, block,
            down=lambda width: make(width, width, resample=halve),
            middle=lambda width: [make(width, width, attention=attending), make(width, width)],
            up=lambda width: make(width, width, resample=double),
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
