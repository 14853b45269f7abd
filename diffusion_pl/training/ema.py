"""The exponential moving average of the weights, counted in images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from diffusion_pl.errors import UserError

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class EMA:
    """Settings of the average (Karras 2022, App. F.3; Ho 2020, App. B without ramp-up).

    Args:
        half_life: images after which a weight counts half, > 0. DDPM's decay 0.9999 at batch 128 is
            a half-life of 887,000 images.
        ramp_up: half-life as a fraction of the images seen, while that is shorter; None for none.
        posthoc_every: images between snapshots of two more averages, from which one of any length
            can be made afterwards (see power_ema.py); None for none. They take twice the memory of
            the weights, and each snapshot as much disk.
    """

    half_life: float
    ramp_up: float | None = None
    posthoc_every: int | None = None

    def __post_init__(self) -> None:
        if self.half_life <= 0 or (self.ramp_up is not None and self.ramp_up <= 0):
            raise UserError(
                f"half_life and ramp_up must be positive (got {self.half_life}, {self.ramp_up})"
            )
        if self.posthoc_every is not None and self.posthoc_every < 1:
            raise UserError(f"posthoc_every must be positive or null (got {self.posthoc_every})")

    def decay(self, images: int, batch_size: int) -> float:
        """Weight of the old average in one update, in [0, 1).

        Args:
            images: images seen before this update.
            batch_size: images of this update.
        """
        half_life = self.half_life
        if self.ramp_up is not None:
            half_life = min(half_life, max(self.ramp_up * images, 1e-8))
        return 0.5 ** (batch_size / half_life)


def averaged_copy(module: Module) -> Module:
    """A copy that never trains, in evaluation mode."""
    return copy.deepcopy(module).requires_grad_(False).eval()


class Updates:
    """Updates an average in place; the tensors are looked up once, not every step.

    Args:
        average: from `averaged_copy`.
        current: the module that trains.
        part: a parameter's shard on this device; if both modules are sharded alike, the update
            needs no communication.
    """

    def __init__(
        self,
        average: nn.Module,
        current: nn.Module,
        part: Callable[[Tensor], Tensor] = Tensor.detach,
    ) -> None:
        self.averages = [part(parameter) for parameter in average.parameters()]
        self.parameters = [part(parameter) for parameter in current.parameters()]
        self.buffers = list(zip(average.buffers(), current.buffers(), strict=True))

    @torch.no_grad()
    def __call__(self, decay: float) -> None:
        """Average = decay average + (1 - decay) current, every parameter; buffers are copied."""
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        for target, source in self.buffers:
            target.copy_(source)
