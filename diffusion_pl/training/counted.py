"""Random numbers of layers that depend on (seed, image, layer) alone, not on how a batch is split.

A layer asks for them by being `Counted`: see networks/counted.py, dropout.py and routing.py.
"""

from __future__ import annotations

import logging
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from diffusion_pl.data.draws import uniforms
from diffusion_pl.diffusion.random import generator

logger = logging.getLogger(__name__)


@runtime_checkable
class Counted(Protocol):
    """A layer that is given its random numbers: for each image a window of one long row."""

    stream: str  # what the numbers are for; layers of one stream share it
    p: float  # what share the layer leaves out, 0 if it needs no numbers
    length: int  # places at which a window may start

    def row(self, source: torch.Generator) -> Tensor:
        """The row, (2 length,), the second half as the first."""

    def begin(self, row: Tensor, places: Tensor) -> None:
        """Set the row, and where the windows of the next batch start."""


class CountedRandomness:
    """Gives a network's layers their random numbers before each forward pass.

    Args:
        network: the raw F; torch's own dropout is warned about, since its masks depend on how the
            batch is split.
        seed: of the run.
    """

    def __init__(self, network: nn.Module, seed: int) -> None:
        self.seed = seed
        self.layers: dict[str, list[Counted]] = {}
        for layer in network.modules():
            if isinstance(layer, Counted) and layer.p:
                self.layers.setdefault(layer.stream, []).append(layer)
        self.rows: dict[tuple[str, float, int], Tensor] = {}
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
        """Set every layer's numbers for a micro-batch.

        Args:
            positions: of the images in the run, int64 (B,), on the host.
            device: of the network.
        """
        for stream, layers in self.layers.items():
            count = len(layers)
            counters = positions[None, :] * count + torch.arange(count)[:, None]
            drawn = uniforms(self.seed, stream, counters.flatten()).view(counters.shape)
            lengths = torch.tensor([layer.length for layer in layers])
            places = (drawn * lengths[:, None]).long().to(device, non_blocking=True)
            for layer, own in zip(layers, places.unbind(), strict=True):
                layer.begin(self._row(layer, device), own)

    def _row(self, layer: Counted, device: torch.device) -> Tensor:
        """The row of a layer, made once on the CPU and shared by those like it."""
        key = layer.stream, layer.p, layer.length
        if key not in self.rows or self.rows[key].device != device:
            source = generator(self.seed, f"{layer.stream} row", 0)
            self.rows[key] = layer.row(source).to(device)
        return self.rows[key]
