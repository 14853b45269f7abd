"""Dropout masks that depend on (seed, image, layer) alone, not on how a batch is split."""

from __future__ import annotations

import logging
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from diffusion_pl.data.draws import uniforms
from diffusion_pl.diffusion.random import generator

logger = logging.getLogger(__name__)


@runtime_checkable
class CountedDropout(Protocol):
    """A dropout layer that is given its masks; see networks/dropout.py."""

    p: float
    row: int  # positions at which a mask may start

    def begin(self, kept: Tensor, places: Tensor) -> None:
        """Set the masks of the next batch."""


class DropoutMasks:
    """Sets the masks of a network's dropout layers before each forward pass.

    Args:
        network: the raw F; torch's own dropout is warned about, since its masks depend on how the
            batch is split.
        seed: of the run.
    """

    def __init__(self, network: nn.Module, seed: int) -> None:
        self.seed = seed
        self.layers = [
            layer for layer in network.modules() if isinstance(layer, CountedDropout) and layer.p
        ]
        self.kept: dict[tuple[float, int], Tensor] = {}
        others = [
            name
            for name, layer in network.named_modules()
            if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p
        ]
        if others:
            logger.warning(
                "network: %s draws new masks in each forward pass, so the run changes with "
                "trainer.device_batch_size, devices and compile; "
                "diffusion_pl.networks.dropout.Dropout counts them by image",
                others[0],
            )

    def begin(self, positions: Tensor, device: torch.device) -> None:
        """Set every layer's masks for a micro-batch.

        Args:
            positions: of the images in the run, int64 (B,), on the host.
            device: of the network.
        """
        if not self.layers:
            return
        count = len(self.layers)
        counters = positions[None, :] * count + torch.arange(count)[:, None]
        drawn = uniforms(self.seed, "dropout", counters.flatten()).view(counters.shape)
        rows = torch.tensor([layer.row for layer in self.layers])
        places = (drawn * rows[:, None]).long().to(device, non_blocking=True)
        for layer, own in zip(self.layers, places.unbind(), strict=True):
            layer.begin(self._kept(layer.p, layer.row, device), own)

    def _kept(self, p: float, row: int, device: torch.device) -> Tensor:
        """Random row of kept entries for a probability, made once on the CPU."""
        if (p, row) not in self.kept or self.kept[p, row].device != device:
            drawn = torch.rand(row, generator=generator(self.seed, "dropout row", 0))
            self.kept[p, row] = (drawn >= p).repeat(2).to(device)
        return self.kept[p, row]
