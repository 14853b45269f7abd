"""Our DDPM U-Net as a folder that the diffusers library opens: configs in JSON, safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffusion_pl.diffusion.preconditioning import Denoiser, Preconditioning
from diffusion_pl.diffusion.timesteps import CosineBetas, LinearBetas, Timesteps
from diffusion_pl.interop.diffusers import FIXED
from diffusion_pl.interop.layouts import DIFFUSERS, size
from diffusion_pl.networks.ddpm_unet import DDPMUNet
from diffusion_pl.objectives.ddpm import PredictImage, PredictNoise, PredictVelocity

PREDICTIONS: dict[str, Any] = {
    "epsilon": PredictNoise,
    "v_prediction": PredictVelocity,
    "sample": PredictImage,
}
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
SCHEDULER_KEYS = ("rescale_betas_zero_snr", "trained_betas")


def write(
    denoiser: Denoiser,
    resolution: int,
    folder: Path,
    *,
    clip: bool = True,
    variance: str = "small",
) -> None:
    """Write config.json, scheduler_config.json and diffusion_pytorch_model.safetensors.

    `UNet2DModel.from_pretrained(folder)` and `DDPMScheduler.from_pretrained(folder)` open it.

    Args:
        denoiser: a DDPMUNet under a preconditioning by timestep.
        resolution: side of the images.
        folder: made if absent.
        clip: whether the sampler clips what is denoised.
        variance: of the reverse chain, small, large or learned.

    Raises:
        ValueError: another network or preconditioning, or options that diffusers has not.
    """
    network = denoiser.network
    if not isinstance(network, DDPMUNet):
        raise ValueError(
            f"only a DDPMUNet has the diffusers layout (got {type(network).__name__}); "
            "export it as safetensors"
        )
    scheduler = _scheduler(denoiser.preconditioning, clip, variance)
    config = _config(network, resolution)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config), ("scheduler_config.json", scheduler)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    # safetensors keeps no views.
    state = {key: value.contiguous().clone() for key, value in DIFFUSERS.write(network)}
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(state, file, metadata={"format": "pt"})


def _config(network: DDPMUNet, resolution: int) -> dict[str, Any]:
    """UNet2DModel's arguments for our network."""
    if network.position.octaves:
        raise ValueError("diffusers has no position encoding (octaves); export it as safetensors")
    blocks, levels = size(network)
    firsts: list[Any] = [network.encoder[level * (blocks + 1)] for level in range(levels)]
    kinds = ["" if first.attention is None else "Attn" for first in firsts]
    return {
        "_class_name": "UNet2DModel",
        **{key: ours for key, (ours, _) in FIXED.items() if key not in SCHEDULER_KEYS},
        "sample_size": resolution,
        "in_channels": network.channels,
        "out_channels": network.out_conv.out_channels,
        "block_out_channels": [first.conv1.out_channels for first in firsts],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": blocks,
        "norm_num_groups": network.out_norm.num_groups,
        "num_class_embeds": network.classes or None,
    }


def _scheduler(preconditioning: Preconditioning, clip: bool, variance: str) -> Mapping[str, Any]:
    """DDPMScheduler's arguments for a preconditioning by timestep.

    Raises:
        ValueError: the network does not see a timestep, or predicts something else.
    """
    timesteps = getattr(preconditioning, "timesteps", None)
    if not isinstance(timesteps, Timesteps):
        raise ValueError(
            f"diffusers has no table for {type(preconditioning).__name__}; export it as safetensors"
        )
    sigmas = timesteps.sigmas()
    wanted = preconditioning(sigmas)
    same = [
        name
        for name, make in PREDICTIONS.items()
        if all(map(torch.allclose, wanted, make(timesteps)(sigmas)))
    ]
    if not same:
        raise ValueError(
            f"diffusers has no prediction_type for {type(preconditioning).__name__}; "
            "export it as safetensors"
        )
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": timesteps.T,
        "prediction_type": same[0],
        "variance_type": VARIANCES.get(variance, "fixed_small"),
        "clip_sample": clip,
        **_betas(timesteps),
    }


def _betas(timesteps: Timesteps) -> dict[str, Any]:
    """The table by its name where it has one, else every beta."""
    betas = timesteps.betas
    first, last = float(betas[0]), float(betas[-1])
    if first <= last and torch.allclose(betas, LinearBetas(timesteps.T, first, last).betas):
        return {"beta_schedule": "linear", "beta_start": first, "beta_end": last}
    if torch.allclose(betas, CosineBetas(timesteps.T).betas):
        return {"beta_schedule": "squaredcos_cap_v2"}
    return {"trained_betas": betas.tolist()}
