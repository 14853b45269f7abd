"""How EDM's published checkpoints name and shape their weights (Karras 2022, released code).

Their layers are named by resolution, `enc.16x16_block0`; ours are numbered as they run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.song_layers import kernel

PARTS = {"attention.norm": "norm2", "attention.qkv": "qkv", "attention.proj": "proj"}


def names(config: Mapping[str, Any], network: nn.Module) -> Iterator[tuple[str, str]]:
    """Every key of a network's state dict, with the published one."""
    ours_to_theirs = dict(places(config))
    for key in network.state_dict():
        module = re.match(r"(?:encoder|decoder|middle|auxiliary)\.\d+|\w+", key)
        assert module is not None
        part, _, leaf = key[module.end() + 1 :].rpartition(".")
        part = "" if key.startswith("auxiliary") else PARTS.get(part, part)
        yield key, ".".join(word for word in (ours_to_theirs[module.group()], part, leaf) if word)


def published(config: Mapping[str, Any], network: nn.Module) -> dict[str, Tensor]:
    """The weights of one of our networks under the published names, filters included.

    Args:
        config: as `edm.read` gives it.
        network: the raw network that the config makes.
    """
    state = network.state_dict()
    found = {theirs: state[ours] for ours, theirs in names(config, network)}
    song, taps = config["model_type"] == "SongUNet", kernel(config.get("resample_filter", [1, 1]))
    for ours, theirs in places(config):
        part = theirs.rpartition("_")[2]
        if part in ("down", "up"):
            found[f"{theirs}.conv0.resample_filter"] = taps
            found[f"{theirs}.skip.resample_filter"] = taps
        elif part == "residual" and song and f"{ours}.conv.weight" in state:
            found[f"{theirs}.resample_filter"] = taps
    return found


def config_of_weights(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the published weights' names and shapes say of their config; dropout they do not.

    Raises:
        UserError: the weights are not in EDM's layout.
    """
    found = {int(m.group(1)) for key in state if (m := re.match(r"model\.enc\.(\d+)x", key))}
    sizes = sorted(found, reverse=True)
    try:
        width = state["model.map_layer1.weight"].shape[0] // 4
        names = [f"model.enc.{size}x{size}_block" for size in sizes]
        taps = {value.shape[-1] for key, value in state.items() if key.endswith("resample_filter")}
        config: dict[str, Any] = {
            "model_type": "DhariwalUNet" if "model.out_norm.weight" in state else "SongUNet",
            "img_resolution": sizes[0],
            "img_channels": state[f"model.enc.{sizes[0]}x{sizes[0]}_conv.weight"].shape[1],
            "model_channels": width,
            "channel_mult": [state[f"{n}0.conv0.weight"].shape[0] // width for n in names],
            "num_blocks": sum(f"{names[0]}{n}.conv0.weight" in state for n in range(len(state))),
            "attn_resolutions": [
                size
                for size, name in zip(sizes, names, strict=True)
                if f"{name}0.qkv.weight" in state
            ],
        }
        for key in ("label", "augment"):
            table = state.get(f"model.map_{key}.weight")
            config[f"{key}_dim"] = 0 if table is None else table.shape[1]
        if config["model_type"] == "SongUNet":
            residual = any("aux_residual" in key for key in state)
            config |= {
                "embedding_type": "fourier" if "model.map_noise.freqs" in state else "positional",
                "channel_mult_noise": state["model.map_layer0.weight"].shape[1] // width,
                "encoder_type": "residual" if residual else "standard",
                "resample_filter": [1, 3, 3, 1] if 4 in taps else [1, 1],
            }
    except (KeyError, IndexError) as error:
        raise UserError(f"the weights are not in EDM's layout (no {error})") from error
    return config


def places(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Our modules and the published ones."""
    sizes = [config["img_resolution"] >> level for level in range(len(config["channel_mult"]))]
    for name in ("map_noise", "map_label", "map_augment", "map_layer0", "map_layer1"):
        yield name, f"model.{name}"
    yield from sides(sizes, config["num_blocks"], "model")
    for level, size in enumerate(sizes[1:]):
        yield f"auxiliary.{level}", f"model.enc.{size}x{size}_aux_residual"
    last = f"dec.{sizes[0]}x{sizes[0]}_aux" if config["model_type"] == "SongUNet" else "out"
    yield "out_norm", f"model.{last}_norm"
    yield "out_conv", f"model.{last}_conv"


def sides(sizes: Sequence[int], blocks: int, prefix: str) -> Iterator[tuple[str, str]]:
    """The stem and the blocks of a U-Net, EDM's or EDM2's, ours and theirs as they run.

    Args:
        sizes: resolutions of the levels, from the full one down.
        blocks: a level of the encoder.
        prefix: of the network in the file.
    """
    at = [f"{size}x{size}" for size in sizes]
    yield "stem", f"{prefix}.enc.{at[0]}_conv"
    number = count()
    for level, size in enumerate(at):
        if level:
            yield f"encoder.{next(number)}", f"{prefix}.enc.{size}_down"
        for block in range(blocks):
            yield f"encoder.{next(number)}", f"{prefix}.enc.{size}_block{block}"
    yield "middle.0", f"{prefix}.dec.{at[-1]}_in0"
    yield "middle.1", f"{prefix}.dec.{at[-1]}_in1"
    number = count()
    for level in reversed(range(len(at))):
        for block in range(blocks + 1):
            yield f"decoder.{next(number)}", f"{prefix}.dec.{at[level]}_block{block}"
        if level:
            yield f"decoder.{next(number)}", f"{prefix}.dec.{at[level - 1]}_up"
