"""Files of a run: written whole or not at all, and nothing left of what was not."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Any) -> None:
    """Write beside the target, flush to the disk, then rename: the target is whole or as before.

    Args:
        path: the file to make or replace.
        write: called with the open binary file.

    Raises:
        ValueError: the folder cannot be written or is full; the target is as before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ValueError(
            f"{path}: cannot be written ({error}); free space or permissions, then run again"
        ) from error


def sweep(run: Path) -> None:
    """Remove what processes that were killed while they wrote have left in a run's folder."""
    for path in run.rglob(".*.tmp"):
        path.unlink(missing_ok=True)
