"""Where the dropout of each image looks up its masks, counted from (seed, image, layer)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from diffusion_pl.data.draws import uniforms
from diffusion_pl.diffusion.random import generator
from diffusion_pl.networks.dropout import PLACES, Dropout

logger = logging.getLogger(__name__)


class DropoutMasks:
    """The dropout layers of a network in training, told before each pass which images they see.

    Args:
        network: the raw F; dropout that is not `networks.dropout.Dropout` is named in a line, since
            its masks depend on how the batch is cut.
        seed: the run's.
    """

    def __init__(self, network: nn.Module, seed: int) -> None:
        self.seed = seed
        self.layers = [
            layer for layer in network.modules() if isinstance(layer, Dropout) and layer.p
        ]
        self.kept: dict[float, Tensor] = {}
        others = [
            name
            for name, layer in network.named_modules()
            if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p
        ]
        if others:
            logger.warning(
                "network: %s draws its masks once a pass, so the run changes with "
                "trainer.device_batch_size, devices and compile; "
                "diffusion_pl.networks.dropout.Dropout counts them by image",
                others[0],
            )

    def begin(self, positions: Tensor, device: torch.device) -> None:
        """Give every layer the places of these images.

        Args:
            positions: of the images in the run, int64 (B,), on the host.
            device: where the network computes.
        """
        if not self.layers:
            return
        count = len(self.layers)
        counters = positions[None, :] * count + torch.arange(count)[:, None]
        drawn = uniforms(self.seed, "dropout", counters.flatten()).view(counters.shape)
        places = (drawn * PLACES).long().to(device, non_blocking=True)
        for layer, own in zip(self.layers, places.unbind(), strict=True):
            layer.begin(self._kept(layer.p, device), own)

    def _kept(self, p: float, device: torch.device) -> Tensor:
        """The choices of a probability, made once, on the CPU: all devices have the same."""
        if p not in self.kept or self.kept[p].device != device:
            drawn = torch.rand(PLACES, generator=generator(self.seed, "dropout row", 0))
            self.kept[p] = (drawn >= p).repeat(2).to(device)
        return self.kept[p]
