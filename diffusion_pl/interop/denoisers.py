"""A published model as a network and a denoiser, whatever layout it came in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_pl import config as configs
from diffusion_pl.config import Config
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.errors import UserError
from diffusion_pl.networks.counting import at_most, spare


def meta_network(node: dict[str, Any], state: Mapping[str, Tensor]) -> Any:
    """The network of an experiment's node, without memory for its weights.

    Args:
        node: the `network`.
        state: the published weights; a network of far more tensors is refused.

    Raises:
        UserError: the node makes no network, or one of too many tensors.
    """
    with at_most(spare(len(state))), torch.device("meta"):
        return configs.build(_config({"network": node}), "network")


def _unchanged(ours: str, value: Tensor) -> Tensor:
    return value


def _nothing(key: str) -> bool:
    return False


def matched(
    network: nn.Module,
    names: Iterable[tuple[str, str]],
    state: Mapping[str, Tensor],
    *,
    convert: Callable[[str, Tensor], Tensor] = _unchanged,
    unread: Callable[[str], bool] = _nothing,
    refusal: Callable[[str], Exception] = UserError,
    layout: str = "",
) -> dict[str, Tensor]:
    """A network's state dict from published weights.

    Args:
        network: that is to have them.
        names: every key of its state dict, with the published one.
        state: the published weights.
        convert: our key and a published tensor to that tensor as ours.
        unread: whether a published key that no name leads to may be left out.
        refusal: makes the error of what does not fit.
        layout: for the message, such as " in EDM's layout".

    Raises:
        UserError: names the first key that is missing, surplus or of another shape.
    """
    own, found, used = network.state_dict(), {}, set()
    for ours, theirs in names:
        if theirs not in state:
            raise refusal(f"{theirs}: is missing{layout}")
        value = convert(ours, state[theirs])
        if value.shape != own[ours].shape:
            shapes = f"has shape {tuple(state[theirs].shape)}, not {tuple(own[ours].shape)}"
            raise refusal(f"{theirs}: {shapes}")
        found[ours] = value
        used.add(theirs)
    for key in state:
        if key not in used and not unread(key):
            raise refusal(f"{key}: is not in the network that the config makes")
    return found


def denoiser_from(
    layout: ModuleType, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> Denoiser:
    """A published model as a denoiser, `denoiser(x, sigma, label=...)`, x = image + sigma noise.

    Args:
        layout: a module of this folder that reads checkpoints, such as `edm`.
        config: as its `read` gives it.
        state: the published weights.

    Returns:
        In evaluation mode, without gradients.

    Raises:
        UserError: names the first key that does not fit.
    """
    tree = _config(layout.nodes(config))
    fitting = layout.weights(config, state)  # before memory is taken for what the config says
    network = configs.build(tree, "network")
    network.load_state_dict(fitting)
    denoiser: Denoiser = configs.build(tree, "objective").denoiser(network)
    return denoiser.eval().requires_grad_(False)


def _config(tree: dict[str, Any]) -> Config:
    return Config("published", "checkpoint", tree)
