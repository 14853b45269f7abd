"""Signals that stop a run, and the mark that it can be resumed; imports nothing heavy.

Once training steps are made, a signal only sets a flag, and the run stops between steps. Before the
first step it stops at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from diffusion_pl import locks
from diffusion_pl.io.files import write_atomically

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

# Exit code of a run that was stopped and can be resumed (sysexits.h: temporary failure).
RESUMABLE = 75

# A file in the folder of a run that can be resumed, written after the checkpoint. It is needed
# because schedulers change exit codes (srun turns 75 into 143).
MARKER = "REQUEUE"

# A file there with the reason of a failure that would recur.
FAILED = "FAILED"


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """Have this process killed when the process `parent` ends; at once if it has (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def is_later_rank() -> bool:
    """Whether this process is not rank 0, without importing torch."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return any(os.environ.get(name, "0") != "0" for name in names)


class StopError(BaseException):
    """A stop before the first step; a BaseException, so `except Exception` cannot swallow it."""


class StopRequest:
    """Takes the signals that stop a run, while the `with` lasts."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.patient = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.listen()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait_for_steps(self) -> None:
        """From now on a signal only sets a flag; handlers installed meanwhile are replaced."""
        self.patient = True
        self.listen()

    def listen(self) -> None:
        """Install the handlers; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            handler = signal.signal(number, self._note)
            self._before.setdefault(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os._exit(128 + number)  # a second Ctrl-C exits at once
        again, self.signal = self.signal is not None, number
        if not self.patient and not again:
            raise StopError

    @property
    def name(self) -> str:
        return (
            "a signal to another rank" if self.signal is None else signal.Signals(self.signal).name
        )

    def mark_before_steps(self, run: Path) -> None:
        """Mark a run stopped before its first step, unless another process is training it."""
        if is_later_rank() or locks.live_holder(run / locks.NAME) is None:
            self.mark(run)

    def mark(self, run: Path) -> None:
        """Mark that a run can be resumed."""
        write_atomically(run / MARKER, lambda file: file.write(f"{self.name}\n".encode()))
