"""Checkpoints of the diffusers library (`UNet2DModel` and its scheduler), read into our network.

The published DDPM models come in this form. What a config says is turned into the nodes of an
experiment, so an imported model is one of ours in every respect. What is not understood is refused
by its name: a pipeline, a second network, a class, a key; what no file says is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.interop.denoisers import meta_network
from diffusion_pl.interop.diffusers_schedulers import KEYS, SCHEDULER, Process, class_of, process
from diffusion_pl.interop.files import read_json, read_safetensors
from diffusion_pl.interop.layouts import DIFFUSERS, multiple
from diffusion_pl.interop.pickles import read_state, state_dict
from diffusion_pl.interop.values import choice, flag, got, only, real, several, whole

NETWORK = "UNet2DModel"
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
CONFIG, SCHEDULER_CONFIG, INDEX = "config.json", "scheduler_config.json", "model_index.json"
STEM = "diffusion_pytorch_model"
RAW, AVERAGE = "unet", "unet_ema"
NOTES = "_notes"  # our key for what a user is to know of what was read
FROM = "_from"  # our keys for the folder of the weights and that of the scheduler
# UNet2DModel's own defaults.
USUAL: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", *3 * ["AttnDownBlock2D"]],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": [*3 * ["AttnUpBlock2D"], "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# What `EMAModel` writes beside them; it says how the average was made.
AVERAGING = {
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step",
    "use_ema_warmup", "num_updates",
}  # fmt: skip
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "mish": "mish"}
# A level's block: whether it attends, and whether it changes the resolution by a residual block;
# None where another key decides.
BLOCKS: dict[str, tuple[bool, bool | None]] = {
    "Block2D": (False, False), "AttnBlock2D": (True, None), "ResnetsampleBlock2D": (False, True),
}  # fmt: skip
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PREFIXES = ("module.", "_orig_mod.")  # of networks saved within a wrapper of torch's


def read(
    folder: Path, said: Mapping[str, Any] | None = None, weights: str = "ema"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a downloaded model: a pipeline's folder, a training checkpoint, or one network's folder.

    Nothing in it is run: JSON, safetensors, or a .bin of plain tensors.

    Args:
        folder: with model_index.json, `unet` or `unet_ema`, or a config.json of its own.
        said: keys of the network's or the scheduler's config that the user says, over the file's;
            `_class_name` is the scheduler's.
        weights: "ema" for the average where it is there beside the raw weights, "raw" for these.

    Returns:
        The network's config with the scheduler's keys in one dict, and the weights in float32.

    Raises:
        UserError: a file is missing, unreadable or of what is not understood.
    """
    _refuse_pipeline(folder)
    if folder.name in (RAW, AVERAGE) and (folder.parent / INDEX).is_file():
        _refuse_pipeline(folder.parent)  # a network alone may be one of several
    unet, notes = _network_folder(folder, weights)
    config = read_json(unet / CONFIG)
    name = config.get("_class_name", NETWORK)
    if name != NETWORK:
        raise UserError(f"{unet / CONFIG}: is of a {name}, not of a {NETWORK}; no network here")
    config[FROM] = {"weights": str(unet)}
    places = (folder / "scheduler", folder, unet, unet.parent / "scheduler",
              unet.parent, unet.parent.parent / "scheduler")  # fmt: skip
    file = next((f for place in places if (f := place / SCHEDULER_CONFIG).is_file()), None)
    if file is not None:
        scheduler = read_json(file)
        # Both have num_train_timesteps; only the scheduler's says something.
        own = {"_class_name": name, SCHEDULER: scheduler.get("_class_name")}
        if not isinstance(own[SCHEDULER], str):
            raise UserError(f"{file}: does not say its class (_class_name)")
        config = config | scheduler | own
        config[FROM]["scheduler"] = str(file)
    else:
        config.pop("num_train_timesteps", None)
    if said:
        renamed = {SCHEDULER if key == "_class_name" else key: value for key, value in said.items()}
        config |= renamed
    state, more = _weights(unet)
    config[NOTES] = [*notes, *more]
    return config, state


def asked(config: Mapping[str, Any]) -> str | None:
    """What the files do not say and the user has to, None when they say all."""
    if config.get(SCHEDULER) is None:
        return (
            f"there is no {SCHEDULER_CONFIG}, so nothing says which noise the network knows; copy "
            "it there, or say it: --set _class_name=DDPMScheduler --set beta_schedule=linear "
            "--set num_train_timesteps=1000 --set prediction_type=epsilon, or --set objective=..."
        )
    return None


def _refuse_pipeline(folder: Path) -> None:
    """Refuse a folder of another pipeline, or with a second network.

    Raises:
        UserError: names it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder / CONFIG}: cannot be read (the source must be a folder)")
    if (file := folder / INDEX).is_file():
        index = read_json(file)
        name = index.get("_class_name")
        for key, value in index.items():
            if key.startswith("_") or key in ("unet", "scheduler") or value in (None, [None, None]):
                continue
            if isinstance(value, list):
                raise UserError(
                    f"{file}: holds a second network or part, {key} {got(value)}; only a "
                    f"{NETWORK} of images with its scheduler is understood"
                )
        part = index.get("unet", ["diffusers", NETWORK])
        if part != ["diffusers", NETWORK]:
            raise UserError(f"{file}: unet must be a {NETWORK} of diffusers {got(part)}")
        if name not in PIPELINES:
            raise UserError(
                f"{file}: is of the pipeline {str(name)[:80]}, which is not understood; "
                f"{', '.join(PIPELINES)} are"
            )
    for inside in sorted(folder.iterdir()):
        if inside.name in (RAW, AVERAGE, "scheduler") or not (inside / CONFIG).is_file():
            continue
        name = read_json(inside / CONFIG).get("_class_name")
        if name is not None:
            raise UserError(
                f"{inside}: is a second network, {str(name)[:80]}; only a {NETWORK} of images "
                "with its scheduler is understood"
            )


def _network_folder(folder: Path, weights: str) -> tuple[Path, list[str]]:
    """Where the network lies, and what to say of the choice."""
    raw, average = folder / RAW, folder / AVERAGE
    if average.is_dir() and raw.is_dir():
        chosen, other = (average, "raw") if weights == "ema" else (raw, "ema")
        return chosen, [f"weights of {chosen}; --weights {other} takes the others"]
    for inside in (average, raw):
        if inside.is_dir():
            return inside, []
    if not (folder / CONFIG).exists():
        beside = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"{folder / CONFIG}: cannot be read (no such file, and no {RAW} folder; there are "
            f"{beside})"
        )
    return folder, []


def _weights(unet: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in float32, and what to say of them."""
    whole_file, pickled = unet / f"{STEM}.safetensors", unet / f"{STEM}.bin"
    if whole_file.is_file():
        file, found = whole_file, read_safetensors(whole_file)[1]
    elif pickled.is_file():
        file, found = pickled, read_state(pickled)
    else:
        others = sorted(path.name for path in unet.glob(f"{STEM}*"))
        if any(".index." in name for name in others):
            what = "the weights are in shards"
        elif others:
            what = f"there are only the variants {', '.join(others)[:200]}"
        else:
            what = "there are no weights"
        raise UserError(
            f"{unet}: {what}; must hold {STEM}.safetensors or .bin (in the library: "
            "UNet2DModel.from_pretrained(...), then save_pretrained with a large max_shard_size)"
        )
    state = state_dict(found, str(file))
    kinds = {
        str(value.dtype).removeprefix("torch.")
        for value in found.values()
        if value.dtype != torch.float32
    }
    notes = [f"weights in {', '.join(sorted(kinds))} become float32"] if kinds else []
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state, notes


def nodes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `network`, `objective` and `sampler` nodes of an experiment that says the same.

    Args:
        config: UNet2DModel's arguments and the scheduler's in one dict; absent ones have that
            library's defaults.

    Raises:
        UserError: names the first key that has no equal here, and what would fit.
    """
    class_of(config)
    for key, value in config.items():
        known = key in USUAL or key in KEYS or key in AVERAGING or key.startswith("_")
        if not known and value is not None:
            raise UserError(f"{key}: is not understood here {got(value)}")
    found = process(config)
    network = _network(config)
    _refuse_variance(config, network, found)
    return {"network": network, "objective": found.objective, "sampler": found.sampler}


def notes(config: Mapping[str, Any]) -> list[str]:
    """What a user is to know of what was read."""
    return [*config.get(NOTES, []), *process(config).notes]


def _refuse_variance(config: Mapping[str, Any], network: dict[str, Any], found: Process) -> None:
    """Output channels and what the scheduler makes of them must agree."""
    if network["learned_variance"] != found.learned:
        said = config.get("variance_type", "none")
        raise UserError(
            f"out_channels: {config.get('out_channels', 3)} of {network['channels']} image "
            f"channels do not go with variance_type {said}; twice the channels with learned_range"
        )


def _network(config: Mapping[str, Any]) -> dict[str, Any]:
    """The node of our network for a config of the library's.

    Raises:
        UserError: names the first key that has no equal here.
    """
    config = {**USUAL, **config}
    for key, ours in {
        "center_input_sample": False, "time_embedding_type": "positional",
        "mid_block_scale_factor": 1, "class_embed_type": None,
    }.items():  # fmt: skip
        only(config, key, ours, ours)
    widths = several(config, "block_out_channels", int)
    side = _side(config)
    attends, resample = _levels(config, len(widths))
    channels = whole(config, "in_channels", 3)
    out = whole(config, "out_channels", 3)
    if out not in (channels, 2 * channels):
        raise UserError(
            f"out_channels: must be in_channels = {channels}, or twice as many with a learned "
            f"variance (got {out}); a network with another input beside the image is not understood"
        )
    scale = choice(config, "resnet_time_scale_shift", None,
                   {"default": False, "scale_shift": True})  # fmt: skip
    groups = whole(config, "norm_num_groups", 32)
    node = {
        "_target_": "diffusion_pl.networks.ddpm_unet.DDPMUNet",
        "resolution": side,
        "channels": channels,
        "classes": whole({"num_class_embeds": config["num_class_embeds"] or 0},
                         "num_class_embeds", 0, 0),
        "model_channels": widths[0],
        "channel_mult": [multiple(width, widths[0]) for width in widths],
        "blocks": whole(config, "layers_per_block", 2, 1, 64),
        "attention": [side // 2**level for level, attend in enumerate(attends) if attend],
        "dropout": _dropout(config),
        "groups": groups,
        "learned_variance": out == 2 * channels,
        "head_channels": _head(config, widths),
        "eps": real(config, "norm_eps", 1e-5),
        "activation": choice(config, "act_fn", "silu", ACTIVATIONS),
        "cosine_first": flag(config, "flip_sin_to_cos", True),
        "endpoint": choice(config, "freq_shift", 0, {0: False, 1: True}),
        "adaptive_scale": scale,
        "resample": resample,
        "middle": _middle(config, scale, groups),
        "embedding_channels": config["time_embedding_dim"]
        and whole(config, "time_embedding_dim", None),
    }  # fmt: skip
    return {key: value for key, value in node.items() if value != DEFAULTS.get(key, node)}


# Settings of ours that need not be written where they are as Ho has them.
DEFAULTS: dict[str, Any] = {
    "head_channels": None, "activation": "silu", "cosine_first": False, "endpoint": True,
    "adaptive_scale": False, "resample": "right", "middle": "attention",
    "embedding_channels": None,
}  # fmt: skip


def _side(config: Mapping[str, Any]) -> int:
    """The side of the images."""
    side = config["sample_size"]
    if side is None:
        raise UserError(
            "sample_size: the config does not say it; say the side of the images, as by "
            "--set sample_size=32"
        )
    if isinstance(side, list | tuple) and len(side) == 2 and side[0] == side[1]:
        side = side[0]
    if isinstance(side, list | tuple):
        raise UserError(f"sample_size: must be one number, images here are square {got(side)}")
    return whole({"sample_size": side}, "sample_size", None)


def _dropout(config: Mapping[str, Any]) -> float:
    value = config["dropout"]
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise UserError(f"dropout: must be a share from 0 to 1 {got(value)}")
    return float(value)


def _head(config: Mapping[str, Any], widths: list[int]) -> int | None:
    """Channels of an attention head, None for one head."""
    if config["attention_head_dim"] is None:
        return None
    return whole(config, "attention_head_dim", 8, 1)


def _middle(config: Mapping[str, Any], scale: bool, groups: int) -> str:
    """What stands between the encoder and the decoder."""
    kind = choice(config, "mid_block_type", None, {"UNetMidBlock2D": True, None: False})
    if not kind:
        return "none"
    if not flag(config, "add_attention", True):
        return "plain"
    own = config["attn_norm_num_groups"]
    # Left out it is norm_num_groups, and no normalisation at all with scale_shift.
    if own != groups and (own is not None or scale):
        raise UserError(
            f"attn_norm_num_groups: must be norm_num_groups = {groups} with "
            f"resnet_time_scale_shift {config['resnet_time_scale_shift']} {got(own)}"
        )
    return "attention"


def _levels(config: Mapping[str, Any], levels: int) -> tuple[list[bool], str]:
    """Which levels attend, and how the resolution changes between them.

    Raises:
        UserError: blocks that our network has not, or that differ on its two sides.
    """
    sides, ways = [], set()
    for key, word, way in (("down_block_types", "Down", "downsample_type"),
                           ("up_block_types", "Up", "upsample_type")):  # fmt: skip
        found = several(config, key, str)
        if len(found) != levels:
            raise UserError(f"{key}: must be one for each of block_out_channels {got(found)}")
        attends = []
        for level, block in enumerate(found):
            kind = block.removeprefix("UNetRes")
            plain = kind.replace(word, "", 1) if word in kind else ""
            if plain not in BLOCKS:
                known = ", ".join(
                    name.replace("sample", f"{word}sample") if "sample" in name
                    else name.replace("Block", f"{word}Block") for name in BLOCKS
                )  # fmt: skip
                raise UserError(f"{key}: must be of {known} (got {block[:80]!r})")
            attend, residual = BLOCKS[plain]
            if residual is None:
                residual = choice(config, way, "conv", {"conv": False, "resnet": True})
            attends.append(attend)
            if level < levels - 1:
                ways.add(residual)
        sides.append(attends)
    if sides[0] != sides[1][::-1]:
        raise UserError(
            f"up_block_types: must mirror down_block_types {got(config['up_block_types'])}"
        )
    if len(ways) > 1:
        raise UserError(
            "downsample_type: some levels would be resampled by a convolution and some by a "
            f"residual block {got([*config['down_block_types'], *config['up_block_types']])}"
        )
    if ways == {True}:
        return sides[0], "block"
    return sides[0], str(choice(config, "downsample_padding", 1, {0: "right", 1: "even"}))


def weights(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our network's state dict from published weights, of either time's attention names.

    Raises:
        UserError: names the first key that does not fit, and the config that would.
    """
    state = {_new_name(key): value for key, value in state.items()}
    node = _network(config)
    fit = DIFFUSERS.shape(state)
    fit["attention"] = [node["resolution"] // 2**level for level in fit.pop("attends")]
    for key, value in fit.items():
        if node[key] != value:
            raise UserError(f"{key}: is {node[key]} by the config; the weights fit {value}")
    network = meta_network(node, state)
    return DIFFUSERS.read(state, network)


def _new_name(key: str) -> str:
    return ".".join(OLD_NAMES.get(part, part) for part in key.split("."))
