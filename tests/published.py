"""Reads the reference outputs' weights, in the published key names, into our networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_pl.interop import diffusers
from diffusion_pl.networks.ddpm_unet import DDPMUNet
from diffusion_pl.networks.song_unet import SongUNet

# The published name of a part of a block, and ours.
EDM_PARTS = {"norm2": "attention.norm", "qkv": "attention.qkv", "proj": "attention.proj"}


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
    return diffusers.denoiser_from(fixture.config, fixture.weights).network
