"""Running sums for the rows of the log, kept on the device so that no step waits for them."""

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
        """Add scalars of a step."""
        for name, number in numbers.items():
            self.sums[name] = self.sums[name] + number if name in self.sums else number

    def read(self) -> dict[str, float]:
        """Means over steps and ranks since the last call; every rank calls it."""
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
        """Restore from a checkpoint: each rank its own sums, or the mean for other ranks."""
        mine, world_size = ranks.rank(), ranks.world_size()
        self.steps = state["steps"]
        self.sums = {
            name: total[mine] if len(total) == world_size else total.mean()
            for name, total in state["sums"].items()
        }
