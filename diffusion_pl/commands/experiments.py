"""`experiments`: the names, each with the first line of its file."""

from __future__ import annotations

import argparse
import sys

from diffusion_pl import config
from diffusion_pl.names import shown

FAILURES: tuple[type[Exception], ...] = ()


def run(options: argparse.Namespace) -> int:
    """Print a line an experiment: those of the folder experiments/, else those of the package."""
    everything = config.all_experiments()
    own = config.EXPERIMENTS.is_dir() and not options.all
    found = config.experiments() if own else everything
    width = max(map(len, found), default=0)
    for name, line in found.items():
        print(f"{shown(name):{width}}  {shown(line)}")
    if more := len(everything) - len(found):
        print(shown(f"and {more} that come with the package: experiments --all"), file=sys.stderr)
    return 0
