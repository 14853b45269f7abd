"""Ends a process that hangs, or whose parent has ended."""

from __future__ import annotations

import faulthandler
import os
import time

from diffusion_pl.signals import end_with

_ARMED_AGAIN_AFTER = 0.05  # of the limit, so that a call of `alive` costs next to nothing


class Watchdog:
    """Prints the stacks of all threads and ends the process, with 1, if `alive` is not called.

    The interpreter's own (faulthandler): its thread needs nothing of those that hang.

    Args:
        limit: seconds after the last call.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.armed: float | None = None

    def alive(self) -> None:
        """Restart the countdown; the first call starts it."""
        now = time.monotonic()
        if self.armed is None or now - self.armed > _ARMED_AGAIN_AFTER * self.limit:
            self.armed = now
            faulthandler.dump_traceback_later(self.limit, exit=True, file=2)

    def stop(self) -> None:
        """Stop the countdown; safe to call twice."""
        self.armed = None
        faulthandler.cancel_dump_traceback_later()


def end_with_parent() -> None:
    """Have a rank killed when its parent process ends, however that happens (Linux).

    A stopped or hung rank would otherwise stay forever. Other processes are left alone.
    """
    if "LOCAL_RANK" in os.environ:
        end_with(os.getppid())
