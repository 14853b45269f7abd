"""`experiments`: the names, each with the first line of its file."""

from __future__ import annotations

import argparse

from diffusion_pl import config

FAILURES: tuple[type[Exception], ...] = ()


def run(options: argparse.Namespace) -> int:
    """Print a line an experiment."""
    found = config.experiments()
    width = max(map(len, found), default=0)
    for name, line in found.items():
        print(f"{name:{width}}  {line}")
    return 0
