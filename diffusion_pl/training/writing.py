"""What a run's folder is cleared of when the run starts."""

from __future__ import annotations

from pathlib import Path

from diffusion_pl import processes
from diffusion_pl.files import write_atomically

__all__ = ["sweep", "write_atomically"]


def sweep(run: Path) -> None:
    """Remove what processes that were killed while they wrote have left in a run's folder.

    What a living process is writing, `evaluate` say, stays.
    """
    for path in run.rglob(".*.tmp"):
        if processes.is_leftover(path):
            path.unlink(missing_ok=True)
