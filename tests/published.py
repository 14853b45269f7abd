"""Reads the reference outputs' weights, in the published key names, into our networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_pl.networks.ddpm_unet import DDPMUNet
from diffusion_pl.networks.song_unet import SongUNet

# The published name of a part of a block, and ours.
EDM_PARTS = {"norm2": "attention.norm", "qkv": "attention.qkv", "proj": "attention.proj"}
DIFFUSERS_PARTS = {
    "norm1": "norm0",
    "conv1": "conv0",
    "time_emb_proj": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "conv_shortcut": "skip",
}


class Fixture:
    """One file of reference outputs: `fixture["out/eps"]` is a tensor."""

    def __init__(self, path: Path) -> None:
        self.arrays = np.load(path)
        self.config = json.loads(str(self.arrays["config"]))
        self.weights = {
            key.removeprefix("param/"): torch.from_numpy(self.arrays[key])
            for key in self.arrays.files
            if key.startswith("param/")
        }

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])


def song_unet(fixture: Fixture) -> SongUNet:
    """The DDPM++ network of an EDM fixture."""
    config = fixture.config
    network = SongUNet(
        config["img_resolution"],
        classes=config["label_dim"],
        augment=config["augment_dim"],
        model_channels=config["model_channels"],
        channel_mult=config["channel_mult"],
        blocks=config["num_blocks"],
        attention=config["attn_resolutions"],
        dropout=0.0,
    )
    state, places, counts = {}, {}, {"enc": 0, "dec": 0}
    for key, value in fixture.weights.items():
        parts = key.removeprefix("model.").split(".")
        if "resample_filter" in parts:
            continue
        if parts[0] not in counts:
            state[".".join(parts)] = value
            continue
        side, name, *rest = parts
        if (side, name) not in places:
            places[side, name] = _place(side, name, counts)
        rest = [EDM_PARTS.get(part, part) for part in rest]
        state[".".join([places[side, name], *rest])] = value
    network.load_state_dict(state)
    return network.eval()


def _place(side: str, name: str, counts: dict[str, int]) -> str:
    """Where a part with a name like 16x16_block0 stands in our network."""
    part = name.partition("_")[2]
    fixed = {
        "conv": "stem",
        "in0": "middle.0",
        "in1": "middle.1",
        "aux_norm": "out_norm",
        "aux_conv": "out_conv",
    }
    if part in fixed:
        return fixed[part]
    counts[side] += 1
    return f"{'encoder' if side == 'enc' else 'decoder'}.{counts[side] - 1}"


def ddpm_unet(fixture: Fixture) -> DDPMUNet:
    """The DDPM U-Net of a fixture in the diffusers layout."""
    config = fixture.config
    sizes = [config["sample_size"] // 2**i for i in range(len(config["block_out_channels"]))]
    attends = ["Attn" in block for block in config["down_block_types"]]
    width = config["block_out_channels"][0]
    blocks = config["layers_per_block"]
    network = DDPMUNet(
        config["sample_size"],
        model_channels=width,
        channel_mult=[channels // width for channels in config["block_out_channels"]],
        blocks=blocks,
        attention=[size for size, attend in zip(sizes, attends, strict=True) if attend],
        dropout=0.0,
        groups=config["norm_num_groups"],
    )
    weights = dict(fixture.weights)
    state = {}
    for key in [key for key in weights if ".to_q." in key]:
        q, k, v = (weights.pop(key.replace("to_q", name)) for name in ("to_q", "to_k", "to_v"))
        # Ours keeps the three of a channel side by side.
        weights[key.replace("to_q", "qkv")] = torch.stack([q, k, v], 1).flatten(0, 1)
    for key, value in weights.items():
        name, value = _diffusers_name(key, blocks), value
        if "qkv.weight" in name or "proj.weight" in name:
            value = value[:, :, None, None]
        state[name] = value
    network.load_state_dict(state)
    return network.eval()


def _diffusers_name(key: str, blocks: int) -> str:
    fixed = {
        "conv_in": "stem",
        "time_embedding.linear_1": "map_layer0",
        "time_embedding.linear_2": "map_layer1",
        "conv_norm_out": "out_norm",
        "conv_out": "out_conv",
    }
    module, _, leaf = key.rpartition(".")
    if module in fixed:
        return f"{fixed[module]}.{leaf}"
    parts = module.split(".")
    if parts[0] == "mid_block":
        place, kind, number, rest = "middle", parts[1], int(parts[2]), parts[3:]
    else:
        level, kind, number, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        down = parts[0] == "down_blocks"
        # A level is its blocks and the resampling after them; the decoder has one block more.
        length = blocks + (1 if down else 2)
        place = "encoder" if down else "decoder"
        number += level * length
        if kind in ("downsamplers", "upsamplers"):
            number += length - 1
    if kind == "attentions":
        names = {"group_norm": "norm", "qkv": "qkv", "to_out": "proj"}
        return f"{place}.{number}.attention.{names[rest[0]]}.{leaf}"
    name = rest[0] if kind.endswith("samplers") else DIFFUSERS_PARTS[rest[0]]
    return f"{place}.{number}.{name}.{leaf}"
