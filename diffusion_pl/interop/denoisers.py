"""A published model as a denoiser, whatever layout it came in."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from diffusion_pl import config as configs
from diffusion_pl.config import Config
from diffusion_pl.diffusion.preconditioning import Denoiser


def denoiser_of(tree: Config, state: Mapping[str, Tensor]) -> Denoiser:
    """Build the network and the objective of an imported model.

    Args:
        tree: holds `network` and `objective`.
        state: the network's, known to fit: that is seen before memory is taken for what the
            published settings say.

    Returns:
        `denoiser(x, sigma)`, x = image + sigma noise, that takes no gradients.
    """
    network = configs.build(tree, "network")
    network.load_state_dict(state)
    denoiser: Denoiser = configs.build(tree, "objective").denoiser(network)
    return denoiser.eval().requires_grad_(False)
