"""`completion`: what makes a shell complete the commands and their options."""

from __future__ import annotations

from typing import Literal

from diffusion_pl import cli
from diffusion_pl.commands.results import Result


def command(shell: Literal["bash", "zsh", "fish"], /) -> Result:
    """Print a script that makes a shell complete commands and options.

    Example: diffusion_pl completion bash > ~/.local/share/bash-completion/completions/diffusion_pl

    Args:
        shell: which.
    """
    script = cli.program().generate_completion(shell=shell)
    return Result({"script": script}, script.splitlines(), in_pipes=True)
