"""Ho's own DDPM weights as converted for PyTorch (the "pytorch_diffusion" layout), read.

The file holds the state dict alone, so the config is read off the shapes; what no shape tells is
that of the published models: attention at 16 pixels, the table of 1,000 linear betas, dropout 0.1
and the large variance at 32 pixels, none and the small variance above (Ho 2020, App. B).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_pl import config as configs
from diffusion_pl.config import Config
from diffusion_pl.data.pickle_program import reason_of
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.interop.layouts import PESSER

ATTENTION = 16  # pixels at which the published networks attend


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a converted checkpoint, such as ema_diffusion_cifar10_model/model-790000.ckpt.

    Returns:
        The config that the shapes tell, as DDPMUNet's arguments, and the weights.

    Raises:
        ValueError: unreadable, holding more than tensors, or of another layout.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: holds more than tensors; refused") from error
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(f"{path}: cannot be read as a checkpoint ({reason_of(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: must be a state dict, names to tensors")
    return config_of(state), state


def config_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """DDPMUNet's arguments for published weights.

    Raises:
        ValueError: another layout, or no single level with attention.
    """
    found = PESSER.shape(state)
    attends = found.pop("attends")
    if len(attends) != 1:
        raise ValueError(
            f"the published models attend at one level, {ATTENTION} pixels (these weights at "
            f"{len(attends)}), so their resolution cannot be told"
        )
    resolution = ATTENTION * 2 ** attends[0]
    dropout = 0.1 if resolution == 32 else 0.0
    return {"resolution": resolution, **found, "attention": [ATTENTION], "dropout": dropout}


def nodes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `network`, `objective` and `sampler` nodes of an experiment that says the same."""
    table = {"T": 1000, "beta_1": 1e-4, "beta_T": 0.02}
    return {
        "network": {"_target_": "diffusion_pl.networks.ddpm_unet.DDPMUNet", **config},
        "objective": {"_target_": "diffusion_pl.objectives.ddpm.DDPM", **table},
        "sampler": {
            "_target_": "diffusion_pl.samplers.sampler.Sampler",
            "integrate": {
                "_target_": "diffusion_pl.samplers.ancestral.ancestral",
                "_partial_": True,
                "variance": "large" if config["resolution"] == 32 else "small",
            },
            "schedule": {
                "_target_": "diffusion_pl.diffusion.timesteps.LinearBetas",
                **table,
            },
            "steps": 1000,
            "clip": True,
            "unit_start": True,
        },
    }


def weights(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our network's state dict from published weights.

    Raises:
        ValueError: names the first key that does not fit.
    """
    with torch.device("meta"):
        network = configs.build(_config(nodes(config)), "network")
    return PESSER.read(state, network)


def denoiser_from(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Denoiser:
    """A published model as a denoiser, `denoiser(x, sigma)`, x = image + sigma noise.

    Args:
        config: as `read` gives it.
        state: the published weights.
    """
    tree = _config(nodes(config))
    fitting = weights(config, state)  # before memory is taken for what the config says
    network = configs.build(tree, "network")
    network.load_state_dict(fitting)
    denoiser: Denoiser = configs.build(tree, "objective").denoiser(network)
    return denoiser.eval().requires_grad_(False)


def _config(tree: dict[str, Any]) -> Config:
    return Config("pytorch_diffusion", "checkpoint", tree)
