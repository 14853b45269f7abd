"""What tells a run to stop, and what it leaves for whoever starts it again; imports in no time.

Once steps are made a signal only sets a flag, so nothing is torn. Before the first step there is
nothing to tear, and the run stops where it is.
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

# What a run that was stopped and can go on ends with (sysexits.h: a temporary failure).
RESUMABLE = 75

# A file of the run's folder that is there while it waits to go on. Schedulers change exit codes on
# the way (srun turns 75 into 143); the file is written after the checkpoint, and is the truth.
MARKER = "REQUEUE"


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends, however that ended (Linux).

    Args:
        parent: its number; if it has ended already, so does this process.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def is_later_rank() -> bool:
    """Whether another process leads this one's run, as `ranks` says once torch is there."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return any(os.environ.get(name, "0") != "0" for name in names)


class StopError(BaseException):
    """The process was told to stop before it made a step; no Exception, so that nobody mends it."""


class StopRequest:
    """Whether this process was told to stop, while the `with` lasts."""

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
        """From now on a signal is only noted; whoever took it meanwhile gives it back."""
        self.patient = True
        self.listen()

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
        again, self.signal = self.signal is not None, number
        if not self.patient and not again:
            raise StopError

    @property
    def name(self) -> str:
        """The signal's name."""
        return (
            "a signal to another rank" if self.signal is None else signal.Signals(self.signal).name
        )

    def mark_before_steps(self, run: Path) -> None:
        """Write it of a run that has made no step here, unless another process goes on with it.

        A second start leaves no mark on a run that goes on; a rank of its own may.

        Raises:
            UserError: it cannot be written.
        """
        if is_later_rank() or locks.live_holder(run / locks.NAME) is None:
            self.mark(run)

    def mark(self, run: Path) -> None:
        """Write that a run waits to go on.

        Raises:
            UserError: it cannot be written.
        """
        write_atomically(run / MARKER, lambda file: file.write(f"{self.name}\n".encode()))
