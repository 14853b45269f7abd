"""Ho's own DDPM weights as converted for PyTorch (the "pytorch_diffusion" layout), read.

The file holds the state dict alone, so the config is read off the shapes; what no shape tells is
that of the published models: attention at 16 pixels, the table of 1,000 linear betas, dropout 0.1
and the large variance at 32 pixels, none and the small variance above (Ho 2020, App. B).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.interop.denoisers import meta_network
from diffusion_pl.interop.layouts import PESSER
from diffusion_pl.interop.pickles import read_state, state_dict

ATTENTION = 16  # pixels at which the published networks attend


def read(
    path: Path, said: Mapping[str, Any] | None = None, weights: str = "ema"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a converted checkpoint, such as ema_diffusion_cifar10_model/model-790000.ckpt.

    Args:
        path: the file.
        said: DDPMUNet's arguments that the user says, over what the shapes tell.
        weights: of no use, a file holds one.

    Returns:
        The config that the shapes tell, as DDPMUNet's arguments, and the weights.

    Raises:
        UserError: unreadable, holding more than tensors, or of another layout.
    """
    state = state_dict(read_state(path), str(path))
    return config_of(state) | dict(said or {}), state


def config_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """DDPMUNet's arguments for published weights.

    Raises:
        UserError: another layout, or no single level with attention.
    """
    found = PESSER.shape(state)
    attends = found.pop("attends")
    if len(attends) != 1:
        raise UserError(
            f"the published models attend at one level, {ATTENTION} pixels (these weights at "
            f"{len(attends)}), so their resolution cannot be told"
        )
    resolution = ATTENTION * 2 ** attends[0]
    dropout = 0.1 if resolution == 32 else 0.0
    return {"resolution": resolution, **found, "attention": [ATTENTION], "dropout": dropout}


def asked(config: Mapping[str, Any]) -> str | None:
    """Nothing: the layout is that of a few published models."""
    return None


def notes(config: Mapping[str, Any]) -> list[str]:
    """What a user is to know of what was read."""
    return ["taken for one of Ho's published models: 1,000 linear betas from 1e-4 to 0.02, eps"]


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
            "clip_denoised": True,
            "unit_start": True,
        },
    }


def weights(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our network's state dict from published weights.

    Raises:
        UserError: names the first key that does not fit.
    """
    network = meta_network(nodes(config)["network"], state)
    return PESSER.read(state, network)
