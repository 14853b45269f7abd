"""A run that is told to stop does so between two steps, all ranks at once, with a checkpoint.

A signal only sets a flag, so nothing is torn; see `callbacks.Stop` for what follows.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

from diffusion_pl import ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

# What a run that was stopped and can go on ends with (sysexits.h: a temporary failure).
RESUMABLE = 75

# A file of the run's folder that is there while it waits to go on. Schedulers change exit codes on
# the way (srun turns 75 into 143); the file is written after the checkpoint, and is the truth.
MARKER = "REQUEUE"

# Asking all ranks takes at most this share of the time of a step.
COST = 0.01
MEASURED = 10  # steps after which that is known


class Wish:
    """Whether this process was told to stop, while the `with` lasts."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Wish:
        self.listen()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals, from whoever has them; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            handler = signal.signal(number, self._note)
            self._before.setdefault(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os._exit(128 + number)  # the second Ctrl-C means now
        self.signal = number

    @property
    def name(self) -> str:
        """The signal's name."""
        return (
            "a signal to another rank" if self.signal is None else signal.Signals(self.signal).name
        )


class Agreement:
    """Asks all ranks between steps whether one of them was told to stop, now and then.

    Args:
        wish: this process's.
        device: one that the ranks can talk on.
    """

    def __init__(self, wish: Wish, device: torch.device) -> None:
        self.wish, self.device = wish, device
        self.steps, self.every = 0, 1
        self.asking, self.began = 0.0, time.monotonic()

    def reached(self) -> bool:
        """Whether the run stops here; called by every rank after every step."""
        self.steps += 1
        if self.steps % self.every:
            return False
        started = time.monotonic()
        alone = ranks.world_size() == 1
        wanted = self.wish.signal is not None
        stop = wanted if alone else not ranks.all_agree(not wanted, self.device)
        self.asking += time.monotonic() - started
        if self.steps == MEASURED and not alone:
            self.every = self._interval()
        return stop

    def _interval(self) -> int:
        """Steps between two askings, the same on all ranks."""
        whole = time.monotonic() - self.began
        mine: Any = torch.tensor([self.asking, whole - self.asking], device=self.device)
        asking, computing = ranks.summed(mine).tolist()
        return max(1, math.ceil(asking / max(computing, 1e-9) / COST))
