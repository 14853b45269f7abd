"""Randomness counted from (seed, stream, index), so that nothing of it needs saving.

What is drawn for image i depends on the seed, on what it is for (the stream) and on i alone: not on
the batch, the device count or what was drawn before. A resumed run and a run on other hardware
therefore see the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_pl.seeds import seed_of


def generator(
    seed: int, stream: str, index: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator at the start of the stream of one index."""
    return torch.Generator(device).manual_seed(seed_of(seed, stream, index))


def own_generator(device: torch.device) -> torch.Generator:
    """The generator that a device draws from when none is named, as dropout does."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        cuda: torch.Generator = torch.cuda.default_generators[index]
        return cuda
    return torch.default_generator


class ImageNoise:
    """Standard normal noise for a batch, drawn from one generator an image.

    Called again it goes on along every image's stream, so it serves as a sampler's `randn_like`.

    Args:
        seed: the run's seed.
        indices: index of each image of the batch.
        stream: what the noise is for.
        device: where the noise is drawn; the CPU's and a GPU's numbers differ.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        stream: str = "noise",
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.generators = [generator(seed, stream, index, device) for index in indices]

    def __call__(self, like: Tensor) -> Tensor:
        """Draw noise of the shape (B, ...), dtype and device of `like`; drawn in float32."""
        noise = torch.empty(like.shape, dtype=torch.float32, device=self.device)
        for row, source in zip(noise, self.generators, strict=True):
            row.normal_(generator=source)
        return noise.to(device=like.device, dtype=like.dtype)
