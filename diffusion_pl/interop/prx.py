"""PRX over pixels (Photoroom 2025) as diffusers keeps it: `PRXTransformer2DModel`, read.

The source is a `PRXPixelPipeline`'s folder, whose index tells the scale of the noise and the side
of the images, or the folder of the network alone. Nothing in it is run. Its text encoder is not
read here: see `--null-text`.

| theirs | here |
|---|---|
| t, 1 is noise | c_noise = 1 - t of objectives/jit.py, `reversed_time` |
| 0.05, the least time that the pipeline divides by | `t_eps` |
| encoding of "" | `null_text`, said beside the file |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_pl import text as encoders
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.errors import UserError
from diffusion_pl.interop import denoisers, jit
from diffusion_pl.interop.denoisers import matched, meta_network
from diffusion_pl.interop.diffusers_schedulers import KEYS, SCHEDULER, process
from diffusion_pl.interop.files import read_json, read_safetensors
from diffusion_pl.interop.pickles import state_dict
from diffusion_pl.interop.values import WIDEST, flag, got, only, real, several, whole

NETWORK, PIPELINE = "PRXTransformer2DModel", "PRXPixelPipeline"
FLOW = "FlowMatchEulerDiscreteScheduler"
STEM = "diffusion_pytorch_model"
MOST_SHARDS = 1000
NOTES, FROM, ENCODER = "_notes", "_from", "_text_encoder"
NULL, NULL_MASK, NULL_KNOWN = "null_text", "null_text_mask", "null_text_known"
# PRXTransformer2DModel's own defaults.
USUAL: dict[str, Any] = {
    "in_channels": 16, "patch_size": 2, "context_in_dim": 2304, "hidden_size": 1792,
    "mlp_ratio": 3.5, "num_heads": 28, "depth": 16, "axes_dim": None, "theta": 10000,
    "time_factor": 1000.0, "time_max_period": 10000, "bottleneck_size": None,
    "resolution_embeds": False,
}  # fmt: skip
# Of the pipeline; `steps` and `t_eps` are ours to say. Each with what it is when left out.
SAID: dict[str, Any] = {
    "default_sample_size": None, "prompt_max_tokens": 256, "noise_scale": None, "steps": 28,
    "t_eps": 0.05,
}  # fmt: skip
# Photoroom's times of noise in training: logit normal, moved by a factor of 3 in odds.
MEAN, STD, TEXT_DROPOUT = -math.log(3), 1.0, 0.1
OUTSIDE = {
    "patches": "img_in.0", "stem": "img_in.1", "time.dense0": "time_in.in_layer",
    "time.dense1": "time_in.out_layer", "size.dense0": "resolution_embedder.mlp.in_layer",
    "size.dense1": "resolution_embedder.mlp.out_layer", "text": "txt_in",
    "head": "final_layer.linear", "affine": "final_layer.adaLN_modulation.1",
}  # fmt: skip
BLOCK = {
    "attention.qkv": "attention.img_qkv_proj", "attention.norm_q": "attention.norm_q",
    "attention.norm_k": "attention.norm_k", "attention.text.kv": "attention.txt_kv_proj",
    "attention.text.norm_k": "attention.norm_added_k", "attention.proj": "attention.to_out.0",
    "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "affine": "modulation.lin",
}  # fmt: skip


def read(
    folder: Path, said: Mapping[str, Any] | None = None, weights: str = "ema"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a downloaded model; nothing in it is run.

    Args:
        folder: of the pipeline, with model_index.json, or of the network, with config.json.
        said: keys of the network's, the pipeline's or the scheduler's config, over the file's;
            `null_text` is a file or the name of a text encoder.
        weights: these files hold one set.

    Returns:
        The config in one dict, and the weights in float32.

    Raises:
        UserError: a file is missing, unreadable or of another network or pipeline.
    """
    config: dict[str, Any] = {}
    inside = folder
    if (index := folder / "model_index.json").is_file():
        config = read_json(index)
        if (name := config.get("_class_name")) != PIPELINE:
            raise UserError(f"{index}: is of the pipeline {got(name)}, not of a {PIPELINE}")
        config = {key: config[key] for key in SAID if key in config}
        inside = folder / "transformer"
    file = inside / "config.json"
    network = read_json(file)
    if (name := network.get("_class_name")) != NETWORK:
        raise UserError(f"{file}: must be of a {NETWORK} {got(name)}")
    config |= {key: value for key, value in network.items() if not key.startswith("_")}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        found = read_json(scheduler)
        config |= found | {SCHEDULER: found.get("_class_name")}
        config = {key: value for key, value in config.items() if key in KEYS | {SCHEDULER} or not
                  key.startswith("_")}  # fmt: skip
    state, notes = _weights(inside)
    config = config | dict(said or {}) | {NOTES: notes, FROM: {"weights": str(inside)}}
    if (name := config.get(NULL)) is not None:
        config |= _null(str(name), config)
    return config, state


def _null(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The null text and its mask, from a file or by an encoder, which is named beside them."""
    if (file := Path(name)).is_file():
        found = read_safetensors(file)[1]
        text, mask = found.get("text"), found.get("text_mask")
        if text is None or mask is None or text.ndim != 2 or mask.shape != text.shape[:1]:
            raise UserError(f"{file}: must hold text (L, E) and text_mask (L,), and nothing fits")
        return {NULL: text, NULL_MASK: mask.bool()}
    encoder = encoders.encoder(name, whole(config, "prompt_max_tokens", 256, 2))
    encoded = encoder.encode([""])
    about = {key: getattr(encoder, key) for key in ("name", "digest", "width", "length")}
    return {NULL: encoded.tokens[0], NULL_MASK: encoded.mask[0], ENCODER: about}


def _weights(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in float32, of one file or of its shards, and what to say of them."""
    files = [folder / f"{STEM}.safetensors"]
    if not files[0].is_file():
        index = folder / f"{STEM}.safetensors.index.json"
        if not index.is_file():
            raise UserError(
                f"{folder}: must hold {STEM}.safetensors, or its shards and their index"
            )
        shards = read_json(index).get("weight_map")
        names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
        if not 1 <= len(names) <= MOST_SHARDS or any(Path(name).name != name for name in names):
            raise UserError(f"{index}: does not name the files of the shards beside it")
        files = [folder / name for name in sorted(names)]
    found: dict[str, Tensor] = {}
    for file in files:
        found |= read_safetensors(file)[1]
    kinds = {str(value.dtype).removeprefix("torch.") for value in found.values()} - {"float32"}
    notes = [f"weights in {', '.join(sorted(kinds))} become float32"] if kinds else []
    return state_dict(found, str(folder)), notes


def asked(config: Mapping[str, Any]) -> str | None:
    """What the files do not say and the user has to, None when they say all."""
    for key, example in {
        "default_sample_size": "1024, the side of the images",
        "noise_scale": "2.0, as the published pipeline over pixels has it",
    }.items():
        if config.get(key) is None:
            return f"{key}: no file says it; say it, such as --set {key}={example}"
    if NULL not in config:
        return (
            "null_text: no file says what stands for no text; give the encoding of an empty text, "
            "--null-text FILE (safetensors: text (L, E), text_mask (L,)), or the text encoder, "
            "such as --null-text hf:FOLDER"
        )
    return None


def notes(config: Mapping[str, Any]) -> list[str]:
    """What a user is to know of what was read."""
    own = list(config.get(NOTES, []))
    own.append(
        "the files do not say which noise levels it was trained on: the objective has those of "
        "Photoroom's published training, logit-normal times moved by 3"
    )
    if config.get(SCHEDULER) is None:
        own.append(f"there is no scheduler: {config.get('steps', SAID['steps'])} equal steps of t")
    return own


def nodes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `network`, `objective` and `sampler` nodes of an experiment that says the same.

    Beside them `dropout`, the share of the texts that were hidden in training.

    Raises:
        UserError: a key that is not understood, or of another type or size.
    """
    others = {SCHEDULER, NOTES, FROM, NULL, NULL_MASK, ENCODER, "model_type", "guidance"}
    for key, value in config.items():
        if key not in USUAL.keys() | SAID.keys() | KEYS | others and value is not None:
            raise UserError(f"{key}: is not understood here {got(value)}")
    only(config, "model_type", "PRXPixel", "PRXPixel")
    network = _network(config)
    scale, t_eps = real(config, "noise_scale", 1.0, WIDEST), real(config, "t_eps", 0.05, 1)
    return {
        "network": network,
        "objective": {
            "_target_": "diffusion_pl.objectives.jit.JiT", "mean": round(MEAN, 12), "std": STD,
            "noise_scale": scale, "t_eps": t_eps, "reversed_time": True,
        },
        "sampler": _sampler(config, scale, t_eps),
        "dropout": {"text": TEXT_DROPOUT},
    }  # fmt: skip


def _network(config: Mapping[str, Any]) -> dict[str, Any]:
    """The node of our network."""
    config = {**USUAL, **config}
    only(config, "theta", 10000, 10000)
    only(config, "time_max_period", 10000, 10000)
    patch, width = whole(config, "patch_size", None), whole(config, "hidden_size", None)
    heads, ratio = whole(config, "num_heads", None), real(config, "mlp_ratio", 3.5, 64)
    half = width // heads // 2
    if config["axes_dim"] is None:
        config["axes_dim"] = [32, 32]
    if several(config, "axes_dim", int) != [half, half]:
        raise UserError(
            f"axes_dim: must be [{half}, {half}], half of a head {got(config['axes_dim'])}"
        )
    if config["bottleneck_size"] is None:
        config["bottleneck_size"] = 0
    if config.get("default_sample_size") is None:
        config["default_sample_size"] = 16 * patch
    return {
        "_target_": "diffusion_pl.networks.prx.PRX",
        "resolution": whole(config, "default_sample_size", None),
        "channels": whole(config, "in_channels", None),
        "text_width": whole(config, "context_in_dim", None),
        "text_length": whole(config, "prompt_max_tokens", 256),
        "patch_size": patch,
        "width": width,
        "depth": whole(config, "depth", None, 1, 1000),
        "heads": heads,
        "hidden": int(width * ratio),
        "bottleneck": whole(config, "bottleneck_size", None, 0),
        "sized": flag(config, "resolution_embeds", False),
        "time_factor": real(config, "time_factor", 1000.0),
    }


def _sampler(config: Mapping[str, Any], scale: float, t_eps: float) -> dict[str, Any]:
    """Euler's method in the published number of steps, at the scheduler's times."""
    sampler = jit.sampler(scale, t_eps)
    euler = {"_target_": "diffusion_pl.samplers.euler.euler", "_partial_": True}
    sampler |= {"integrate": euler, "steps": whole(config, "steps", SAID["steps"])}
    if config.get(SCHEDULER) is not None:
        if config[SCHEDULER] != FLOW:
            raise UserError(f"_class_name: the scheduler must be {FLOW} {got(config[SCHEDULER])}")
        schedule = process(config).sampler["schedule"]
        schedule["path"]["shift"] *= scale
        sampler |= {"schedule": schedule}
        del sampler["spacing"]
    return sampler


def weights(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our network's state dict from published weights, and the null text where it was said.

    Raises:
        UserError: names the first key that is missing, surplus or of another shape.
    """
    network = meta_network(nodes(config)["network"], state)
    found = matched(network, names(network), state)
    shape = network.text_length, network.text_width
    text, mask = config.get(NULL), config.get(NULL_MASK)
    if text is None or mask is None:
        found[NULL], found[NULL_MASK] = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.bool)
        return found | {NULL_KNOWN: torch.tensor(False)}
    if text.ndim != 2 or len(text) > shape[0] or text.shape[1] != shape[1]:
        raise UserError(
            f"{NULL}: must have at most {shape[0]} tokens of {shape[1]} channels "
            f"{got(tuple(text.shape))}"
        )
    beyond = shape[0] - len(text)
    text = torch.where(mask[:, None], text.float(), 0)
    found[NULL] = nn.functional.pad(text, (0, 0, 0, beyond))
    found[NULL_MASK] = nn.functional.pad(mask, (0, beyond))
    return found | {NULL_KNOWN: torch.tensor(True)}


def names(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Every key of a network's state dict, with the published one; the null is not published."""
    for key in network.state_dict():
        if key in (NULL, NULL_MASK, NULL_KNOWN):
            continue
        part, _, kind = key.rpartition(".")
        if part.startswith("blocks."):
            _, number, part = part.split(".", 2)
            yield key, f"blocks.{number}.{BLOCK[part]}.{kind}"
        elif part == "stem" and getattr(network, "patches", None) is None:
            yield key, f"img_in.{kind}"
        else:
            yield key, f"{OUTSIDE[part]}.{kind}"


def denoiser_from(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Denoiser:
    """A published model as a denoiser, `denoiser(x, sigma, text=..., text_mask=...)`.

    Args:
        config: arguments of the published network, such as `hidden_size`, and of the pipeline:
            `noise_scale`, `prompt_max_tokens`.
        state: the published weights.

    Returns:
        In evaluation mode, without gradients. What stands for no text is to be set,
        `denoiser.network.set_null_text`.

    Raises:
        UserError: names the first key that does not fit.
    """
    from diffusion_pl.interop import prx  # this module, as the readers are named

    return denoisers.denoiser_from(prx, config, state)
