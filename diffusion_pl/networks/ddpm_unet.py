"""The U-Net of DDPM (Ho 2020, App. B and released code), and of those that came after it.

Its defaults are Ho's. The other settings are what the same skeleton was published with since:
improved DDPM and ADM (Nichol & Dhariwal 2021, Dhariwal & Nichol 2021: adaptive scale, heads,
resampling in residual blocks) and the diffusers library's `UNet2DModel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.layers import (
    GroupNorm,
    PositionalEmbedding,
    SelfAttention,
    double,
    float32_region,
    halve,
    one_hot,
    xavier,
)
from diffusion_pl.networks.residual import ZERO, ResidualBlock
from diffusion_pl.networks.text import Text
from diffusion_pl.networks.unet import Place, UNet

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "mish": F.mish,
}
Activation = Literal["silu", "relu", "gelu", "mish"]
Resample = Literal["right", "even", "block"]
Middle = Literal["attention", "plain", "none"]


def attend(
    norm: nn.GroupNorm, heads: int, head_channels: int | None, text_width: int = 0
) -> SelfAttention:
    """Self-attention of so many heads, or of heads of so many channels.

    Raises:
        UserError: the channels do not divide over the heads.
    """
    channels = norm.num_channels
    heads = channels // head_channels if head_channels else heads
    if heads < 1 or channels % heads or (head_channels and channels // heads != head_channels):
        raise UserError(
            f"{channels} channels are no whole number of attention heads (heads: {heads}, "
            f"head_channels: {head_channels})"
        )
    # Three layers of C to C in the paper's code are one of C to 3 C here; Xavier's bound counts
    # outputs, and sqrt(2) gives each third the bound of its own layer.
    return SelfAttention(norm, heads, gain=math.sqrt(2), text_width=text_width)


class Down(nn.Module):
    """Halve the resolution by a strided convolution.

    Args:
        channels: of x and of the result.
        even: pad by one on every side; on the right and below only otherwise, TensorFlow's "SAME"
            padding of an even side at stride 2, which Ho's published weights rely on.
    """

    def __init__(self, channels: int, *, even: bool = False) -> None:
        super().__init__()
        self.even = even
        self.conv = xavier(nn.Conv2d(channels, channels, 3, stride=2, padding=int(even)))

    def forward(self, x: Tensor, embedding: Tensor, text: Text | None = None) -> Tensor:
        return self.conv(x if self.even else F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Double the resolution by repeating pixels, then a convolution."""

    resample = "double"  # as of a block that does so

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = xavier(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, embedding: Tensor, text: Text | None = None) -> Tensor:
        return self.conv(double(x))


class DDPMUNet(UNet):
    """DDPM's U-Net: 35,746,307 parameters for CIFAR-10, 113,673,219 for LSUN and CelebA-HQ at 256.

    Args:
        resolution: H = W of the images it is built for; decides which levels have attention.
        model_channels: channels at multiplier 1, a multiple of `groups`.
        channel_mult: multiplier of each level, from the full resolution down; need not be whole.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        attention: resolutions whose blocks are each followed by self-attention.
        dropout: probability in every block.
        groups: of every normalisation.
        channels, classes, position_frequencies, frame, learned_variance, activation_checkpointing,
            text_width, text_length, image_channels: as for every `Network`.
        heads: of every attention, one as published by Ho.
        head_channels: channels of a head, instead of their number; None for `heads`.
        eps: of every normalisation.
        activation: the nonlinearity of the residual blocks.
        cosine_first: the sinusoids of the timestep are [cos, sin], not [sin, cos].
        endpoint: whether their last frequency is 1 / 10000 itself; 10000^(-k / half) otherwise.
        adaptive_scale: the embedding scales and shifts in each block (improved DDPM, ADM).
        resample: how the resolution changes: "right" and "even" by convolutions, padded on the
            right and below only or all around; "block" within residual blocks (ADM).
        middle: two blocks with "attention" between them, "plain" without it, "none" of all.
        embedding_channels: length of the embedding vector; 4 model_channels if None.

    Raises:
        UserError: a resolution that the levels do not divide, heads that channels do not, or text
            without attention.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        classes: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
        groups: int = 32,
        position_frequencies: int = 0,
        frame: int | None = None,
        learned_variance: bool = False,
        activation_checkpointing: bool = False,
        *,
        heads: int = 1,
        head_channels: int | None = None,
        eps: float = 1e-6,
        activation: Activation = "silu",
        cosine_first: bool = False,
        endpoint: bool = True,
        adaptive_scale: bool = False,
        resample: Resample = "right",
        middle: Middle = "attention",
        embedding_channels: int | None = None,
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
        embedding = embedding_channels or 4 * model_channels
        self.cosine_first = cosine_first
        self.resample = resample
        self.map_noise = PositionalEmbedding(model_channels, endpoint=endpoint)
        self.map_layer0 = xavier(nn.Linear(model_channels, embedding))
        self.map_layer1 = xavier(nn.Linear(embedding, embedding))
        self.map_label = xavier(nn.Linear(classes, embedding, bias=False)) if classes else None

        attending = partial(attend, heads=heads, head_channels=head_channels, text_width=text_width)
        make: Callable[..., ResidualBlock] = partial(
            ResidualBlock, embedding=embedding, dropout=dropout, adaptive_scale=adaptive_scale,
            norm=partial(GroupNorm, groups, eps=eps), activate=ACTIVATIONS[activation],
            activate_embedding=True,
        )  # fmt: skip
        within = resample == "block"

        def block(channels_in: int, channels_out: int, level: int, place: Place) -> ResidualBlock:
            attends = resolution // 2**level in attention
            return make(channels_in, channels_out, attention=attending if attends else None)

        def down(width: int) -> nn.Module:
            if within:
                return make(width, width, resample=halve)
            return Down(width, even=resample == "even")

        def core(width: int) -> list[ResidualBlock]:
            if middle == "none":
                return []
            attention = attending if middle == "attention" else None
            return [make(width, width, attention=attention), make(width, width)]

        def up(width: int) -> nn.Module:
            return make(width, width, resample=double) if within else Up(width)

        widths = [round(model_channels * multiplier) for multiplier in channel_mult]
        width = widths[0] if within else model_channels
        self.stem = xavier(nn.Conv2d(self.in_channels, width, 3, padding=1))
        self.encoder, self.middle, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width = self.fill(width, widths, blocks, block, down, core, up)
        self.out_norm = GroupNorm(groups, width, eps=eps)
        self.out_conv = xavier(nn.Conv2d(width, self.out_channels, 3, padding=1), ZERO)

    def embed(self, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Embed the condition in float32, whatever autocast says, (B, 4 model_channels)."""
        with float32_region(c_noise.device):
            vector = self.map_noise(c_noise)
            if self.cosine_first:
                vector = vector.roll(vector.shape[1] // 2, dims=1)
            vector = self.map_layer1(F.silu(self.map_layer0(vector)))
            if label is None:
                return vector
            assert self.map_label is not None  # `forward` sees to it
            return vector + self.map_label(one_hot(label, self.classes) * math.sqrt(self.classes))
