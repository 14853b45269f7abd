"""Our DDPM U-Net as a folder that the diffusers library opens: configs in JSON, safetensors.

It is laid out as the published DDPM models are: all files in one folder, which is a pipeline, a
network and a scheduler to the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from diffusion_pl.diffusion.guidance import Clip, thresholded
from diffusion_pl.diffusion.preconditioning import Denoiser, Preconditioning
from diffusion_pl.diffusion.timesteps import CosineBetas, LinearBetas, Timesteps
from diffusion_pl.errors import UserError
from diffusion_pl.interop.diffusers import CONFIG, INDEX, NETWORK, SCHEDULER_CONFIG, STEM
from diffusion_pl.interop.layouts import DIFFUSERS, size
from diffusion_pl.io.files import write_atomically
from diffusion_pl.networks.ddpm_unet import ACTIVATIONS, DDPMUNet
from diffusion_pl.networks.residual import ResidualBlock
from diffusion_pl.objectives.ddpm import PredictImage, PredictNoise, PredictVelocity

PREDICTIONS: dict[str, Any] = {
    "epsilon": PredictNoise,
    "v_prediction": PredictVelocity,
    "sample": PredictImage,
}
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
SCHEDULER = "DDPMScheduler"


def write(
    denoiser: Denoiser,
    resolution: int,
    folder: Path,
    *,
    clip: Clip = True,
    variance: str = "small",
) -> None:
    """Write model_index.json, config.json, scheduler_config.json and the weights.

    `DDPMPipeline.from_pretrained(folder)` opens it, and of its parts `UNet2DModel` and
    `DDPMScheduler`.

    Args:
        denoiser: a DDPMUNet under a preconditioning by timestep.
        resolution: side of the images.
        folder: made if absent.
        clip: what the sampler does to what is denoised.
        variance: of the reverse chain, small, large or learned.

    Raises:
        UserError: another network or preconditioning, or options that diffusers has not.
    """
    network = denoiser.network
    if not isinstance(network, DDPMUNet):
        raise UserError(
            f"only a DDPMUNet has the diffusers layout (got {type(network).__name__}); "
            "export it as safetensors"
        )
    scheduler = _scheduler(denoiser.preconditioning, clip, variance)
    config = _config(network, resolution)
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", SCHEDULER],
        "unet": ["diffusers", NETWORK],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((INDEX, index), (CONFIG, config), (SCHEDULER_CONFIG, scheduler)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    # safetensors keeps no views.
    state = {key: value.contiguous().clone() for key, value in DIFFUSERS.write(network)}
    file = folder / f"{STEM}.safetensors"
    packed = save(state, metadata={"format": "pt"})
    write_atomically(file, lambda opened: opened.write(packed))


def _config(network: DDPMUNet, resolution: int) -> dict[str, Any]:
    """UNet2DModel's arguments for our network.

    Raises:
        UserError: it has what UNet2DModel has not.
    """
    if network.in_channels != network.channels or network.text_width:
        raise UserError(
            "UNet2DModel has no position encoding (position_frequencies), no text (text_width) and "
            "no image beside the noisy one (image_channels); export it as safetensors"
        )
    blocks, levels = size(network)
    firsts: list[Any] = [network.encoder[level * (blocks + 1)] for level in range(levels)]
    widths = [first.conv1.out_channels for first in firsts]
    embedding, groups = network.map_layer0, network.out_norm.num_groups
    if embedding.in_features != widths[0]:
        raise UserError(
            f"diffusers embeds the timestep in as many channels as the first level has "
            f"({widths[0]}, here {embedding.in_features}); export it as safetensors"
        )
    names = {function: name for name, function in ACTIVATIONS.items()}
    kinds = ["" if first.attention is None else "Attn" for first in firsts]
    residual = network.resample == "block"
    plain = "Resnet{0}sampleBlock2D" if residual else "{0}Block2D"
    types = ["Attn{0}Block2D" if kind else plain for kind in kinds]
    middle: list[Any] = list(network.middle)
    way = "resnet" if residual else "conv"
    return {
        "_class_name": NETWORK,
        "sample_size": resolution,
        "in_channels": network.channels,
        "out_channels": network.out_conv.out_channels,
        "block_out_channels": widths,
        "down_block_types": [name.format("Down") for name in types],
        "up_block_types": [name.format("Up") for name in reversed(types)],
        "mid_block_type": "UNetMidBlock2D" if middle else None,
        "add_attention": bool(middle) and middle[0].attention is not None,
        "layers_per_block": blocks,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if firsts[0].adaptive_scale else None,
        "norm_eps": network.out_norm.eps,
        "num_class_embeds": network.classes or None,
        "attention_head_dim": _head(network),
        "act_fn": names[firsts[0].activate],
        "downsample_padding": 1 if network.resample == "even" else 0,
        "downsample_type": way,
        "upsample_type": way,
        "flip_sin_to_cos": network.cosine_first,
        "freq_shift": int(network.map_noise.endpoint),
        "resnet_time_scale_shift": "scale_shift" if firsts[0].adaptive_scale else "default",
        "time_embedding_dim": embedding.out_features,
        "dropout": firsts[0].drop.p,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "mid_block_scale_factor": 1,
        "class_embed_type": None,
    }


def _head(network: DDPMUNet) -> int | None:
    """Channels of an attention head, None where each attention has one.

    Raises:
        UserError: they differ, as with a fixed number of heads.
    """
    found: list[Any] = [
        block.attention
        for block in network.modules()
        if isinstance(block, ResidualBlock) and block.attention is not None
    ]
    if all(attention.heads == 1 for attention in found):
        return None
    sizes = {attention.norm.num_channels // attention.heads for attention in found}
    if len(sizes) > 1:
        raise UserError(
            f"diffusers has attention heads of one size (these are of {sorted(sizes)}); export it "
            "as safetensors"
        )
    return int(sizes.pop())


def _scheduler(preconditioning: Preconditioning, clip: Clip, variance: str) -> Mapping[str, Any]:
    """DDPMScheduler's arguments for a preconditioning by timestep.

    Raises:
        UserError: the network does not see a timestep, or predicts something else.
    """
    timesteps = getattr(preconditioning, "timesteps", None)
    if not isinstance(timesteps, Timesteps):
        raise UserError(
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
        raise UserError(
            f"diffusers has no prediction_type for {type(preconditioning).__name__}; "
            "export it as safetensors"
        )
    return {
        "_class_name": SCHEDULER,
        "num_train_timesteps": timesteps.T,
        "prediction_type": same[0],
        "variance_type": VARIANCES.get(variance, "fixed_small"),
        **_clip(clip),
        **_betas(timesteps),
    }


def _clip(clip: Clip) -> dict[str, Any]:
    """What the scheduler does to a denoised image.

    Raises:
        UserError: a function that diffusers has not.
    """
    if not callable(clip):
        limit = {} if isinstance(clip, bool) else {"clip_sample_range": clip}
        return {"clip_sample": bool(clip), **limit}
    if not isinstance(clip, partial) or clip.func is not thresholded:
        raise UserError(f"diffusers has no {clip} of images; export it as safetensors")
    ratio, most = clip.keywords.get("share", 0.995), clip.keywords.get("most", 1.0)
    names = {"dynamic_thresholding_ratio": ratio, "sample_max_value": most}
    return {"clip_sample": False, "thresholding": True, **names}


def _betas(timesteps: Timesteps) -> dict[str, Any]:
    """The table by its name where it has one, else every beta."""
    betas = timesteps.betas
    first, last = float(betas[0]), float(betas[-1])
    if first <= last and _equal(betas, LinearBetas(timesteps.T, first, last).betas):
        return {"beta_schedule": "linear", "beta_start": first, "beta_end": last}
    if _equal(betas, CosineBetas(timesteps.T).betas):
        return {"beta_schedule": "squaredcos_cap_v2"}
    return {"trained_betas": betas.tolist()}


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=0)
