"""Checkpoints of the diffusers library (`UNet2DModel` and its scheduler), read into our network.

The published DDPM models come in this form. What a config says is turned into the nodes of an
experiment, so an imported model is one of ours in every respect; a config that our network or our
tables cannot follow is refused by its first such key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffusion_pl import config as configs
from diffusion_pl.config import Config
from diffusion_pl.data.pickle_program import reason_of
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.interop.layouts import DIFFUSERS

# What our network computes, as UNet2DModel's arguments say it, and that library's own defaults.
FIXED: dict[str, tuple[Any, Any]] = {
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attention_head_dim": (None, 8),
    "attn_norm_num_groups": (None, None),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "norm_eps": (1e-6, 1e-5),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_dim": (None, None),
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
    # Of the scheduler.
    "rescale_betas_zero_snr": (False, False),
    "trained_betas": (None, None),
}
TABLES = {
    "linear": "diffusion_pl.diffusion.timesteps.LinearBetas",
    "squaredcos_cap_v2": "diffusion_pl.diffusion.timesteps.CosineBetas",
}
PREDICTIONS = {
    "epsilon": "diffusion_pl.objectives.ddpm.PredictNoise",
    "v_prediction": "diffusion_pl.objectives.ddpm.PredictVelocity",
    "sample": "diffusion_pl.objectives.ddpm.PredictImage",
}
VARIANCES = {
    "fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large",
    "fixed_large_log": "large", "learned_range": "learned",
}  # fmt: skip
SCHEDULER = "_scheduler"  # our key for the scheduler's class, beside the network's `_class_name`
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a downloaded model: a pipeline's folder, or its `unet` with a scheduler config beside.

    Nothing in it is run: JSON, safetensors, or a .bin of plain tensors.

    Returns:
        The network's config with the scheduler's keys in one dict, and the weights.

    Raises:
        ValueError: a file is missing or unreadable.
    """
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    config = _json(unet / "config.json")
    for place in (folder / "scheduler", folder, folder.parent / "scheduler"):
        if (place / "scheduler_config.json").is_file():
            scheduler = _json(place / "scheduler_config.json")
            # Both have num_train_timesteps; only the scheduler's says something.
            names = {"_class_name": config.get("_class_name")}
            config = config | scheduler | names | {SCHEDULER: scheduler.get("_class_name")}
            break
    stem = unet / "diffusion_pytorch_model"
    whole, pickled = stem.with_suffix(".safetensors"), stem.with_suffix(".bin")
    try:
        if whole.is_file():
            return config, load_file(whole)
        return config, torch.load(pickled, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{unet}: holds no diffusion_pytorch_model.safetensors or .bin") from error
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{unet}: the weights cannot be read ({error})") from error
    except Exception as error:  # torch names pickle's own error, which is no ValueError
        reason = reason_of(error)
        raise ValueError(f"{pickled}: holds more than tensors; refused ({reason})") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return found


def nodes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `network`, `objective` and `sampler` nodes of an experiment that says the same.

    Args:
        config: UNet2DModel's arguments and the scheduler's in one dict; absent ones have that
            library's defaults.

    Raises:
        ValueError: names the first key that has no equal here, and what would fit.
    """
    for key, (ours, theirs) in FIXED.items():
        if config.get(key, theirs) != ours:
            raise ValueError(f"{key}: must be {ours!r} (got {config.get(key, theirs)!r})")
    T = config.get("num_train_timesteps") or 1000
    schedule = config.get("beta_schedule", "linear")
    prediction = config.get("prediction_type", "epsilon")
    variance = config.get("variance_type", "fixed_small")
    for key, value, known in [
        ("beta_schedule", schedule, TABLES),
        ("prediction_type", prediction, PREDICTIONS),
        ("variance_type", variance, VARIANCES),
    ]:
        if value not in known:
            raise ValueError(f"{key}: must be one of {', '.join(known)} (got {value!r})")
    table: dict[str, Any] = {"_target_": TABLES[schedule], "T": T}
    if schedule == "linear":
        table["beta_1"] = config.get("beta_start", 1e-4)
        table["beta_T"] = config.get("beta_end", 0.02)
    return {
        "network": _network(config),
        "objective": _objective(table, prediction),
        "sampler": _sampler(config, table, VARIANCES[variance]),
    }


def _network(config: Mapping[str, Any]) -> dict[str, Any]:
    """The node of our network for a config whose fixed keys fit."""
    widths = config["block_out_channels"]
    side = config["sample_size"]
    down, up = config["down_block_types"], config["up_block_types"]
    for key, blocks in (("down_block_types", down), ("up_block_types", up)):
        for block in blocks:
            if block.replace("Attn", "").replace("Up", "Down") != "DownBlock2D":
                raise ValueError(f"{key}: must be DownBlock2D, AttnDownBlock2D (got {block!r})")
    attends = ["Attn" in block for block in down]
    if attends != ["Attn" in block for block in reversed(up)]:
        raise ValueError(f"up_block_types: must mirror down_block_types (got {up})")
    if any(width % widths[0] for width in widths) or isinstance(side, list):
        raise ValueError(
            "block_out_channels must be multiples of the first, sample_size one number "
            f"(got {widths} and {side})"
        )
    return {
        "_target_": "diffusion_pl.networks.ddpm_unet.DDPMUNet",
        "resolution": side,
        "channels": config.get("in_channels", 3),
        "classes": config.get("num_class_embeds") or 0,
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "blocks": config.get("layers_per_block", 2),
        "attention": [side // 2**level for level, attend in enumerate(attends) if attend],
        "dropout": float(config.get("dropout", 0.0)),
        "groups": config.get("norm_num_groups", 32),
        "variance": config.get("out_channels", 3) == 2 * config.get("in_channels", 3),
    }


def _objective(table: dict[str, Any], prediction: str) -> dict[str, Any]:
    """DDPM where it is that, else an objective of its parts."""
    if prediction == "epsilon" and "beta_1" in table:
        return {**table, "_target_": "diffusion_pl.objectives.ddpm.DDPM"}
    parts = "diffusion_pl.diffusion.objective."
    weight: dict[str, Any] = {"_target_": f"{parts}NoiseError"}
    if prediction == "v_prediction":  # the squared error of v
        weight = {"_target_": f"{parts}UnitOutput", "sigma_data": 1.0}
    return {
        "_target_": f"{parts}Objective",
        "schedule": table,
        "preconditioning": {"_target_": PREDICTIONS[prediction], "timesteps": table},
        "weight": weight,
        "reduce": {"_target_": f"{parts}pixel_mean", "_partial_": True},
    }


def _sampler(config: Mapping[str, Any], table: dict[str, Any], variance: str) -> dict[str, Any]:
    """The whole reverse chain, or 50 steps of DDIM where the scheduler is that."""
    deterministic = "DDIM" in str(config.get(SCHEDULER))
    chain = {
        "_target_": "diffusion_pl.samplers.ancestral.ancestral",
        "_partial_": True,
        "variance": variance,
    }
    ddim = {"_target_": "diffusion_pl.samplers.euler.euler", "_partial_": True}
    return {
        "_target_": "diffusion_pl.samplers.sampler.Sampler",
        "integrate": ddim if deterministic else chain,
        "schedule": table,
        "steps": 50 if deterministic else table["T"],
        "clip": bool(config.get("clip_sample", True)),
        "unit_start": True,
    }


def weights(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our network's state dict from published weights, of either time's attention names.

    Raises:
        ValueError: names the first key that does not fit, and the config that would.
    """
    state = {_new_name(key): value for key, value in state.items()}
    node = _network(config)
    fit = DIFFUSERS.shape(state)
    fit["attention"] = [node["resolution"] // 2**level for level in fit.pop("attends")]
    for key, value in fit.items():
        if node[key] != value:
            raise ValueError(f"{key}: is {node[key]} by the config; the weights fit {value}")
    with torch.device("meta"):
        network = configs.build(_config({"network": node}), "network")
    return DIFFUSERS.read(state, network)


def _new_name(key: str) -> str:
    return ".".join(OLD_NAMES.get(part, part) for part in key.split("."))


def denoiser_from(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Denoiser:
    """A published model as a denoiser, `denoiser(x, sigma, label=...)`, x = image + sigma noise.

    Args:
        config: as `read` gives it.
        state: the published weights.

    Raises:
        ValueError: names the first key that does not fit.
    """
    tree = _config(nodes(config))
    fitting = weights(config, state)  # before memory is taken for what the config says
    network = configs.build(tree, "network")
    network.load_state_dict(fitting)
    denoiser: Denoiser = configs.build(tree, "objective").denoiser(network)
    return denoiser.eval().requires_grad_(False)


def _config(tree: dict[str, Any]) -> Config:
    return Config("diffusers", "config.json", tree)
