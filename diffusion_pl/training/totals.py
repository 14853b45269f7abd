"""What a row of the log is the mean of, kept on the device so that no step waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusion_pl import ranks


class Totals:
    """Sums over the steps since the last row, on this rank."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, **numbers: Tensor) -> None:
        """Add numbers of a step, each a scalar."""
        for name, number in numbers.items():
            self.sums[name] = self.sums[name] + number if name in self.sums else number

    def read(self) -> dict[str, float]:
        """Means over the steps and the ranks since the last reading; every rank calls it."""
        means = {
            name: float(ranks.sum_over_ranks(total)) / ranks.world_size() / self.steps
            for name, total in self.sums.items()
        }
        self.sums, self.steps = {}, 0
        return means

    def state(self) -> dict[str, Any]:
        """The sums of all ranks, for a checkpoint; every rank calls it."""
        sums = {name: ranks.gather(total.reshape(1)).cpu() for name, total in self.sums.items()}
        return {"steps": self.steps, "sums": sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: each rank from its own sums, or their mean if ranks differ."""
        mine, world_size = ranks.rank(), ranks.world_size()
        self.steps = state["steps"]
        self.sums = {
            name: total[mine] if len(total) == world_size else total.mean()
            for name, total in state["sums"].items()
        }
