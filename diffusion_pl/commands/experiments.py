"""`experiments`: the names, each with the first line of its file."""

from __future__ import annotations

from diffusion_pl import config
from diffusion_pl.commands.results import Result


def command(*, all: bool = False) -> Result:
    """List the experiments with their published numbers.

    They are those of the folder experiments/, where there is one, else those of the package.

    Example: diffusion_pl experiments --all

    Args:
        all: those of the package too, where there is experiments/.
    """
    everything = config.all_experiments()
    own = config.EXPERIMENTS.is_dir() and not all
    found = config.experiments() if own else everything
    width = max(map(len, found), default=0)
    lines = [f"{name:{width}}  {line}" for name, line in found.items()]
    after = []
    if more := len(everything) - len(found):
        after = [f"and {more} that come with the package: experiments --all"]
    return Result(found, lines, after, in_pipes=True)
