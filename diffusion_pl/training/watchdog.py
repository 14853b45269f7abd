"""Nothing waits for ever: what ends a process that stands still, or whose parent is gone."""

from __future__ import annotations

import faulthandler
import os
import time

from diffusion_pl.signals import end_with

_ARMED_AGAIN_AFTER = 0.05  # of the limit, so that a sign of life costs next to nothing


class Watchdog:
    """Prints the stacks of all threads and ends the process, with 1, when it shows no life.

    It is the interpreter's own (faulthandler), a thread that needs nothing of the stuck ones.

    Args:
        limit: seconds from the last sign of life.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.armed: float | None = None

    def alive(self) -> None:
        """Give a sign of life; the first one starts the watch."""
        now = time.monotonic()
        if self.armed is None or now - self.armed > _ARMED_AGAIN_AFTER * self.limit:
            self.armed = now
            faulthandler.dump_traceback_later(self.limit, exit=True, file=2)

    def stop(self) -> None:
        """End the watch; safe to call twice."""
        self.armed = None
        faulthandler.cancel_dump_traceback_later()


def end_with_parent() -> None:
    """Have a rank killed when the process that started it ends, however that ended (Linux).

    A rank that was stopped or hangs would stay for ever otherwise. One that nobody started as a
    rank is left alone.
    """
    if "LOCAL_RANK" in os.environ:
        end_with(os.getppid())
