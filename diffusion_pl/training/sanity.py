"""Checks of loss and gradient: non-finite values stop a run, spikes are reported."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# A row's loss this many times the median of the rows before it is a spike; a row is the mean over
# thousands of images, so twice is far outside its noise.
SPIKE = 2.0
REMEMBERED, NEEDED = 10, 5  # rows


class NonFiniteError(RuntimeError):
    """The loss or its gradient is infinite or NaN; raised before the weights change.

    Args:
        step: optimizer steps before it.
        problem: message.
    """

    def __init__(self, step: int, problem: str) -> None:
        super().__init__(problem)
        self.step = step


@dataclass(frozen=True)
class Place:
    """The current step, for error messages.

    Args:
        step: optimizer steps done.
        images: images seen.
        side: of the images of the step, pixels.
        positions: in the run, of this device's images of the step.
        u: quantiles of their noise levels.
    """

    step: int
    images: int
    side: int
    positions: list[int]
    u: Tensor

    def complaint(
        self, what: str, value: float, schedule: Callable[[Tensor], Tensor]
    ) -> NonFiniteError:
        """The error for a non-finite value of this step."""
        levels = ", ".join(f"{level:.4g}" for level in schedule(self.u).tolist())
        return NonFiniteError(
            self.step,
            f"the {what} is {value} at step {self.step}, {self.images:,} images; images "
            f"{self.positions[0]:,} to {self.positions[-1]:,} of the run, of {self.side} px; "
            f"noise levels of the batch: {levels}",
        )


class Spikes:
    """Detects a loss far above those of the rows before it."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=REMEMBERED)

    def note(self, loss: float) -> str | None:
        """Add a row's loss; a message if it is a spike."""
        usual = statistics.median(self.losses) if len(self.losses) >= NEEDED else None
        self.losses.append(loss)
        if usual is None or loss <= SPIKE * usual:
            return None
        return f"the loss rose to {loss:.4g}; the median of the rows before is {usual:.4g}"
