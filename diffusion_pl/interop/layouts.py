"""The DDPM U-Net under the key names of others: one table a layout, read in both directions.

Ours numbers the layers of each side in the order they run; the published layouts name the level,
the kind and the number within the level. Queries, keys and values are three layers there, one here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_pl.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The published names of our parts.

    Args:
        name: of the layout, for messages.
        outside: our first word of a key outside the levels, to theirs.
        encoder: prefix of what stands in an encoder level, with {level}.
        decoder: likewise; {level} counts from the lowest resolution, {index} from the full one.
        block: a residual block of a level, with {number}.
        attention: the attention after it, with {number}.
        down: the convolution that halves.
        up: the convolution that follows the doubling.
        middle: the two blocks of the middle and the attention between them.
        parts: of a block, ours to theirs.
        attends: of the attention, ours to theirs.
        qkv: the three layers that are one here.
        label: the class embedding, None if the layout has none.
        resamplers: residual blocks that halve and double, in the place of the convolutions.
    """

    name: str
    outside: Mapping[str, str]
    encoder: str
    decoder: str
    block: str
    attention: str
    down: str
    up: str
    middle: tuple[str, str, str]
    parts: Mapping[str, str]
    attends: Mapping[str, str]
    qkv: tuple[str, str, str]
    label: str | None = None
    resamplers: tuple[str, str] = ("", "")

    def key(self, ours: str, blocks: int, levels: int) -> str:
        """The published name of one of our keys; {qkv} stands for any of the three.

        Args:
            ours: such as `encoder.3.conv0.weight`.
            blocks: residual blocks a level in the encoder.
            levels: resolutions.
        """
        side, *rest, leaf = ours.split(".")
        if side in self.outside:
            return f"{self.outside[side]}.{leaf}"
        number, *part = int(rest[0]), *rest[1:]
        if side == "middle":
            place = self.middle[1 if part[0] == "attention" else 2 * number]
            return f"{place}.{self._part(part)}.{leaf}"
        # A level is its blocks and the resampling after them; the decoder has one block more.
        length = blocks + (1 if side == "encoder" else 2)
        level, within = divmod(number, length)
        template = self.encoder if side == "encoder" else self.decoder
        place = template.format(level=level, index=levels - 1 - level)
        if within == length - 1:
            if part[0] != "conv":
                resampler = self.resamplers[0 if side == "encoder" else 1]
                return f"{place}.{resampler}.{self._part(part)}.{leaf}"
            return f"{place}.{self.down if side == 'encoder' else self.up}.{leaf}"
        kind = self.attention if part[0] == "attention" else self.block
        return f"{place}.{kind.format(number=within)}.{self._part(part)}.{leaf}"

    def _part(self, part: list[str]) -> str:
        if part[0] != "attention":
            return self.parts[part[0]]
        return "{qkv}" if part[1] == "qkv" else self.attends[part[1]]

    def shape(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments of a DDPMUNet that has these weights, but for the resolution.

        Returns:
            channels, model_channels, channel_mult, blocks, classes, variance, and `attends`: the
            levels with attention.

        Raises:
            UserError: the weights are not in this layout; names the first key that is missing.
        """
        stem = _taken(state, f"{self.outside['stem']}.weight", self.name)
        out = _taken(state, f"{self.outside['out_conv']}.weight", self.name)
        width, channels = stem.shape[:2]
        mult: list[float] = []
        attends: list[int] = []
        first = f"{self.block}.{self.parts['conv0']}.weight"
        while (key := f"{self.encoder}.{first}".format(level=len(mult), number=0)) in state:
            mult.append(multiple(state[key].shape[0], width))
            asked = f"{self.encoder}.{self.attention}.{self.attends['norm']}.weight"
            if asked.format(level=len(mult) - 1, number=0) in state:
                attends.append(len(mult) - 1)
        if not mult:
            _taken(state, key, self.name)
        blocks = 0
        while f"{self.encoder}.{first}".format(level=0, number=blocks) in state:
            blocks += 1
        label = state.get(f"{self.label}.weight")
        return {
            "channels": channels,
            "model_channels": width,
            "channel_mult": mult,
            "blocks": blocks,
            "classes": 0 if label is None else label.shape[0],
            "learned_variance": out.shape[0] == 2 * channels,
            "attends": attends,
        }

    def read(self, state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        """Our state dict, from weights in this layout.

        Args:
            state: the published weights.
            network: the DDPMUNet that is to have them.

        Raises:
            UserError: names the first key that is missing, surplus or of another shape.
        """
        blocks, levels = size(network)
        found, used = {}, set()
        for ours, own in network.state_dict().items():
            if ours == "map_label.weight":
                label = f"{self.label}.weight"
                used.add(label)
                # Ours takes a one-hot vector times sqrt(classes), theirs a row of a table.
                table = _taken(state, label, self.name)
                found[ours] = _fit(table.T / math.sqrt(table.shape[0]), own, label, self.name)
                continue
            key = self.key(ours, blocks, levels)
            keys = [key.replace("{qkv}", one) for one in self.qkv] if "{qkv}" in key else [key]
            used.update(keys)
            taken = [_taken(state, one, self.name) for one in keys]
            # Ours keeps the three of a channel side by side.
            value = torch.stack(taken, dim=1).flatten(0, 1) if len(taken) > 1 else taken[0]
            found[ours] = _fit(value, own, keys[0], self.name)
        for key in state:
            if key not in used:
                raise UserError(f"{key}: is not in the network that the config makes")
        return found

    def write(self, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The weights of a DDPMUNet in this layout, 1 x 1 convolutions of attention as matrices."""
        blocks, levels = size(network)
        for ours, value in network.state_dict().items():
            if ours == "map_label.weight":
                yield f"{self.label}.weight", value.T * math.sqrt(value.shape[1])
                continue
            key = self.key(ours, blocks, levels)
            if ".attention." in ours and value.ndim == 4:
                value = value.flatten(1)
            if "{qkv}" not in key:
                yield key, value
                continue
            for one, part in zip(self.qkv, value.unflatten(0, (-1, 3)).unbind(1), strict=True):
                yield key.replace("{qkv}", one), part


def multiple(width: int, of: int) -> float:
    """A width as a multiple of another, an int where it is whole."""
    return width // of if width % of == 0 else width / of


def size(network: nn.Module) -> tuple[int, int]:
    """Residual blocks of an encoder level, and how many levels, of a DDPMUNet."""
    levels = int(network.divisor).bit_length()  # type: ignore[arg-type]
    # An encoder of L levels with b blocks has L b blocks and L - 1 halvings.
    return (len(network.encoder) - levels + 1) // levels, levels  # type: ignore[arg-type]


def _taken(state: Mapping[str, Tensor], key: str, layout: str) -> Tensor:
    if key not in state:
        beside = ", ".join(list(state)[:3]) or "no keys"
        raise UserError(f"{key}: is missing in the {layout} layout (its keys: {beside}, ...)")
    return state[key]


def _fit(value: Tensor, own: Tensor, key: str, layout: str) -> Tensor:
    """A published tensor in our shape, 1 x 1 convolutions being matrices in some layouts."""
    if value.shape != own.shape and (*value.shape, 1, 1) != tuple(own.shape):
        raise UserError(
            f"{key}: has shape {tuple(value.shape)} in the {layout} layout, the network that the "
            f"config makes {tuple(own.shape)}"
        )
    return value.reshape(own.shape)


_PARTS = {"norm0": "norm1", "conv0": "conv1", "norm1": "norm2", "conv1": "conv2"}

DIFFUSERS = Layout(
    name="diffusers",
    outside={
        "stem": "conv_in",
        "map_layer0": "time_embedding.linear_1",
        "map_layer1": "time_embedding.linear_2",
        "out_norm": "conv_norm_out",
        "out_conv": "conv_out",
    },
    encoder="down_blocks.{level}",
    decoder="up_blocks.{level}",
    block="resnets.{number}",
    attention="attentions.{number}",
    down="downsamplers.0.conv",
    up="upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    parts=_PARTS | {"affine": "time_emb_proj", "skip": "conv_shortcut"},
    attends={"norm": "group_norm", "proj": "to_out.0"},
    qkv=("to_q", "to_k", "to_v"),
    label="class_embedding",
    resamplers=("downsamplers.0", "upsamplers.0"),
)

PESSER = Layout(
    name="pytorch_diffusion",
    outside={
        "stem": "conv_in",
        "map_layer0": "temb.dense.0",
        "map_layer1": "temb.dense.1",
        "out_norm": "norm_out",
        "out_conv": "conv_out",
    },
    encoder="down.{level}",
    decoder="up.{index}",
    block="block.{number}",
    attention="attn.{number}",
    down="downsample.conv",
    up="upsample.conv",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    parts=_PARTS | {"affine": "temb_proj", "skip": "nin_shortcut"},
    attends={"norm": "norm", "proj": "proj_out"},
    qkv=("q", "k", "v"),
)
