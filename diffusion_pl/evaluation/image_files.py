"""Image files, to be evaluated like sampled images: numbers of any model."""

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
    """Images of a data set or file, in place of an ImageGenerator.

    Args:
        real: the images.
        source: their path, recorded with the numbers.
        device: to evaluate them on.
        drawn: what `sample` recorded of them, if it made them.
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
        """uint8 (n, C, H, W) with these indices, and 0 network evaluations.

        Raises:
            UserError: there are fewer.
        """
        if max(indices) >= len(self.real):
            raise UserError(
                f"{self.source}: has {len(self.real):,} images (need {max(indices) + 1:,})"
            )
        return self.real.read(torch.tensor(indices)).to(self.device), 0

    def captions(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        """None: files of images do not say what they were asked to show."""
        return None

    def about(self) -> Mapping[str, Any]:
        """What is recorded of these images with every number."""
        drawn = {} if self.drawn is None else {"drawn": self.drawn}
        return {"source": self.source, "source_fingerprint": self.real.fingerprint, **drawn}
