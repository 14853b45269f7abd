"""Ranks agree on stopping between two steps; see `signals` and `callbacks.Stop`."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from diffusion_pl import ranks
from diffusion_pl.signals import StopRequest

COST = 0.01  # largest fraction of the time of steps that asking all ranks may take
MEASURED = 10  # steps after which the cost is known


class Agreement:
    """Asks all ranks every few steps whether one of them has a request to stop.

    Args:
        stop_request: of this process.
        device: for communication.
    """

    def __init__(self, stop_request: StopRequest, device: torch.device) -> None:
        self.stop_request, self.device = stop_request, device
        self.steps, self.every = 0, 1
        self.asking, self.began = 0.0, time.monotonic()

    def reached(self) -> bool:
        """Whether the run stops here; every rank calls it after every step."""
        self.steps += 1
        if self.steps % self.every:
            return False
        started = time.monotonic()
        stop = self.asked()
        self.asking += time.monotonic() - started
        if self.steps == MEASURED and ranks.world_size() > 1:
            self.every = self._interval()
        return stop

    def asked(self) -> bool:
        """Whether any rank has a request to stop; every rank calls it."""
        wanted = self.stop_request.signal is not None
        alone = ranks.world_size() == 1
        return wanted if alone else not ranks.all_agree(not wanted, self.device)

    def _interval(self) -> int:
        """Steps between two questions, the same on all ranks."""
        whole = time.monotonic() - self.began
        mine: Any = torch.tensor([self.asking, whole - self.asking], device=self.device)
        asking, computing = ranks.sum_over_ranks(mine).tolist()
        return max(1, math.ceil(asking / max(computing, 1e-9) / COST))
