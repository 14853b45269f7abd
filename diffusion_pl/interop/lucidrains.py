"""Milestones of denoising_diffusion_pytorch (`model-10.pt`), read into our network.

A milestone holds the network under `model`, its average under `ema`, and GaussianDiffusion's
tables: the betas say the noise, the weights of the loss what the network predicts. The side of the
images it does not say: `--set image_size=64`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.errors import UserError
from diffusion_pl.interop.denoisers import meta_network
from diffusion_pl.interop.pickles import read_state, state_dict
from diffusion_pl.interop.values import LEVELS, got, whole

FROM_WEIGHTS = "_told"  # our key for the settings that the weights show
PREDICTIONS = {"noise": "PredictNoise", "image": "PredictImage", "velocity": "PredictVelocity"}
# A module's words there, ours.
OUTSIDE = {
    "init_conv": "stem", "time_mlp.1": "map_layer0", "time_mlp.3": "map_layer1",
    "mid_block1": "middle.0", "mid_attn": "middle.1", "mid_block2": "middle.2",
    "final_res_block": "out_block", "final_conv": "out_conv",
}  # fmt: skip
PARTS = {
    "mlp.1": "affine", "block1.proj": "conv0", "block1.norm": "norm0", "block2.proj": "conv1",
    "block2.norm": "norm1", "res_conv": "skip", "to_qkv": "qkv", "to_out": "proj",
    "to_out.0": "proj", "to_out.1": "out_norm", "norm": "norm", "": "",
}  # fmt: skip
OF_LEVEL = ("block0", "block1", "attention", "resample")


def read(
    path: Path, said: Mapping[str, Any] | None = None, weights: str = "ema"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a milestone.

    Args:
        path: the file.
        said: `image_size`, and `dropout` for fine-tuning.
        weights: "ema" for the average, "raw" for the network's own weights.

    Returns:
        What the user says and, under FROM_WEIGHTS, what tables and weights show; the weights.

    Raises:
        UserError: unreadable, or no milestone of a U-Net that is understood.
    """
    content = read_state(path)
    average = content.get("ema") if isinstance(content, Mapping) else None
    found, prefix = (average, "ema_model.") if weights == "ema" else (None, "")
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise UserError(f"{path}: no milestone of denoising_diffusion_pytorch (no 'model' in it)")
    if not isinstance(found, Mapping):
        found, prefix = content["model"], ""
    own = {
        key.removeprefix(prefix): value
        for key, value in found.items()
        if isinstance(key, str) and key.startswith(prefix)
    }
    whole_state = state_dict(own, str(path))
    state = {
        key.removeprefix("model."): value
        for key, value in whole_state.items()
        if key.startswith("model.")
    }
    settings = _network_of(state) | _process_of(whole_state)
    settings["notes"] = [
        f"the {'averaged' if prefix else 'raw'} weights; sinusoids of theta 10000 and images in "
        "[-1, 1] (auto_normalize) are the package's defaults, of which a milestone says nothing"
    ]
    return {**(said or {}), FROM_WEIGHTS: settings}, state


def _network_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the weights say of the U-Net.

    Raises:
        UserError: it is one that is not understood.
    """
    for key in ("init_conv.weight", "final_conv.weight", "downs.0.0.block1.norm.g",
                "mid_attn.mem_kv", "downs.0.2.mem_kv"):  # fmt: skip
        if key not in state:
            raise UserError(
                f"model.{key}: is missing; only the Unet of denoising_diffusion_pytorch 1.8 to 2.x "
                "is understood"
            )
    if "time_mlp.0.weights" in state:
        raise UserError("model.time_mlp.0.weights: learned or random sinusoids are not understood")
    stem, out = state["init_conv.weight"], state["final_conv.weight"]
    channels = stem.shape[1]
    if out.shape[0] != channels:
        raise UserError(
            f"model.init_conv.weight: takes {channels} channels and final_conv gives "
            f"{out.shape[0]}; self_condition and learned_variance are not understood"
        )
    width = stem.shape[0]
    mult: list[int] = []
    full: list[bool] = []
    while (key := f"downs.{len(mult)}.3.1.weight") in state or (
        key := f"downs.{len(mult)}.3.weight"
    ) in state:
        full.append(f"downs.{len(mult)}.2.to_out.weight" in state)
        mult.append(state[key].shape[0] // width)
        if len(mult) > LEVELS:
            raise UserError(f"model.{key}: more than {LEVELS} levels")
    memory = state["mid_attn.mem_kv"]
    return {
        "channels": channels, "model_channels": width, "channel_mult": mult, "full": full,
        "heads": memory.shape[1], "memories": memory.shape[2], "head_channels": memory.shape[3],
    }  # fmt: skip


def _process_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The table and the prediction that GaussianDiffusion's buffers tell.

    Raises:
        UserError: they are missing, or tell no prediction.
    """
    for key in ("betas", "alphas_cumprod", "loss_weight"):
        if key not in state or state[key].ndim != 1 or len(state[key]) != len(state["betas"]):
            raise UserError(f"{key}: is no table of GaussianDiffusion's")
    alpha_bar = state["alphas_cumprod"].double()
    snr, weight = alpha_bar / (1 - alpha_bar), state["loss_weight"].double()
    # Where the image weighs less than any gamma of min-SNR, the loss's weight is that of the
    # prediction alone: 1, snr or snr / (1 + snr).
    at = int((snr.log() - torch.tensor(0.5).log()).abs().argmin())
    expected = {"noise": 1.0, "image": float(snr[at]), "velocity": float(snr[at] / (1 + snr[at]))}
    same = [name for name, value in expected.items() if abs(float(weight[at]) - value) < 1e-3]
    if len(same) != 1:
        raise UserError(f"loss_weight: tells no prediction (got {float(weight[at]):g} at t={at})")
    return {"betas": [float(beta) for beta in state["betas"]], "predict": same[0]}


def asked(config: Mapping[str, Any]) -> str | None:
    """What a milestone does not say and the user has to."""
    if "image_size" in config:
        return None
    return "a milestone does not say the side of its images; say it, as by --set image_size=64"


def notes(config: Mapping[str, Any]) -> list[str]:
    """What a user is to know of what was read."""
    return list(config[FROM_WEIGHTS]["notes"])


def nodes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `network`, `objective` and `sampler` nodes of an experiment that says the same.

    Raises:
        UserError: a key that is not known, or out of range.
    """
    for key, value in config.items():
        if key not in ("image_size", "dropout", FROM_WEIGHTS):
            raise UserError(f"{key}: is not understood here {got(value)}")
    betas = config[FROM_WEIGHTS]["betas"]
    T = len(betas)
    timesteps = "diffusion_pl.diffusion.timesteps."
    table: dict[str, Any] = {"_target_": f"{timesteps}Betas", "betas": betas}
    linear = {"T": T, "beta_1": 1e-4 * 1000 / T, "beta_T": 0.02 * 1000 / T}
    if linear["beta_T"] < 1 and T > 1:
        same = LinearBetas(T, linear["beta_1"], linear["beta_T"]).betas.tolist()
        if all(abs(one - other) < 1e-6 * other for one, other in zip(betas, same, strict=True)):
            table = {"_target_": f"{timesteps}LinearBetas", **linear}
    parts = "diffusion_pl.diffusion.objective."
    predicted = f"diffusion_pl.objectives.ddpm.{PREDICTIONS[config[FROM_WEIGHTS]['predict']]}"
    return {
        "network": _network(config),
        "objective": {
            "_target_": f"{parts}Objective",
            "schedule": table,
            "preconditioning": {"_target_": predicted, "timesteps": table},
            # Each prediction's own error times its weight is the noise's.
            "weight": {"_target_": f"{parts}EpsWeight"},
            "reduce": {"_target_": f"{parts}pixel_mean", "_partial_": True},
        },
        "sampler": {
            "_target_": "diffusion_pl.samplers.sampler.Sampler",
            "integrate": {
                "_target_": "diffusion_pl.samplers.ancestral.ancestral",
                "_partial_": True,
                "variance": "small",
            },
            "schedule": table,
            "steps": T,
            "clip_denoised": True,
            "unit_start": True,
        },
    }


def _network(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config[FROM_WEIGHTS]
    keys = ("channels", "model_channels", "channel_mult", "full", "heads", "head_channels",
            "memories")  # fmt: skip
    return {
        "_target_": "diffusion_pl.networks.linear_unet.LinearUNet",
        "resolution": whole(config, "image_size", None),
        **{key: found[key] for key in keys},
        "dropout": float(config.get("dropout", 0.0)),
    }


def weights(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our network's state dict from a milestone's.

    Raises:
        UserError: names the first key that is missing, surplus or of another shape.
    """
    network = meta_network(_network(config), state)
    wanted = network.state_dict()
    found = {}
    for key, value in state.items():
        ours = _ours(key)
        if ours not in wanted:
            raise UserError(f"model.{key}: is not in the network that the weights make")
        if value.shape != wanted[ours].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(wanted[ours].shape)}"
            raise UserError(f"model.{key}: has shape {shapes}")
        found[ours] = value
    for ours in wanted:
        if ours not in found:
            raise UserError(f"model: has no weights for {ours}")
    return found


def _ours(key: str) -> str:
    """Our name of a published key; one of no part of ours is left as it is."""
    level = re.fullmatch(r"(downs|ups)\.(\d+)\.([0-3])\.(.+)", key)
    if level:
        side, number, place, rest = level.groups()
        start = f"{'encoder' if side == 'downs' else 'decoder'}.{number}.{OF_LEVEL[int(place)]}"
        # What resamples is a convolution, or the second of two steps.
        rest = rest.removeprefix("1.") if place == "3" else rest
    else:
        start, rest = next(
            ((ours, key.removeprefix(f"{theirs}.")) for theirs, ours in OUTSIDE.items()
             if key.startswith(f"{theirs}.")), ("", key),
        )  # fmt: skip
    part, _, leaf = rest.rpartition(".")
    leaf = {"g": "gain", "mem_kv": "memory"}.get(leaf, leaf)
    return ".".join(word for word in (start, PARTS.get(part, part), leaf) if word)
