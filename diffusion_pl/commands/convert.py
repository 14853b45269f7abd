"""`convert`: a run's checkpoints of earlier formats, written again in today's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffusion_pl import locks
from diffusion_pl.training import checkpoint as checkpoints

FAILURES: tuple[type[Exception], ...] = ()


def run(options: argparse.Namespace) -> int:
    """Convert in place, and say as one JSON object which were written anew."""
    place: Path = options.run
    files = [place] if place.is_file() else sorted((place / "checkpoints").glob("*.ckpt"))
    if not files:
        raise ValueError(f"{place}: neither a run with checkpoints nor one of them")
    with locks.hold(files[0].parent.parent / locks.NAME, "converting"):
        converted = [str(file) for file in files if convert(file)]
    print(json.dumps({"format": checkpoints.FORMAT, "files": len(files), "converted": converted}))
    return 0


def convert(file: Path) -> bool:
    """Write a checkpoint again in today's format, whole or not at all.

    Returns:
        Whether it was of an earlier one.

    Raises:
        ValueError: it cannot be read or written; it is then as before.
    """
    loaded = checkpoints.load(file)
    section = loaded[checkpoints.SECTION]
    if section["format"] == checkpoints.FORMAT:
        return False
    # Format 1 held the same and had no digest, which `save` puts behind.
    now = {**loaded, checkpoints.SECTION: {**section, "format": checkpoints.FORMAT}}
    checkpoints.save(now, file)
    return True
