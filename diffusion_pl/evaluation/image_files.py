"""Images that lie in files, to be measured like drawn ones: numbers of anybody's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.images import ImageDataset


@dataclass(frozen=True)
class ImageFiles:
    """Images of a data set or file in the place of drawn ones.

    Args:
        real: the images.
        source: where they lie, for the numbers.
        device: where to measure them.
        drawn: how `sample` drew them, where it did.
    """

    real: ImageDataset
    source: str
    device: torch.device
    drawn: Mapping[str, Any] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.real.channels, self.real.resolution, self.real.resolution

    def images(self, indices: Sequence[int]) -> tuple[Tensor, int]:
        """The images with these indices; no network is evaluated.

        Raises:
            UserError: there are fewer.
        """
        if max(indices) >= len(self.real):
            raise UserError(
                f"{self.source}: has {len(self.real):,} images, {max(indices) + 1:,} are asked for"
            )
        return self.real.read(torch.tensor(indices)).to(self.device), 0

    def about(self) -> Mapping[str, Any]:
        """What a number says of these images."""
        drawn = {} if self.drawn is None else {"drawn": self.drawn}
        return {"source": self.source, "source_fingerprint": self.real.fingerprint, **drawn}
