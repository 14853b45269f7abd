"""The command that comes next, as it is typed from here."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from diffusion_pl.names import shown


def interpreter() -> str:
    """This Python as it is typed from here, quoted for a shell."""
    program = Path(sys.executable or "python")
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.quote(str(program))


def command(*words: object) -> str:
    """A command of this package, quoted for a shell."""
    return f"{interpreter()} -m diffusion_pl {shlex.join(map(str, words))}"


def tell(*words: object) -> None:
    """Say on stderr what to type next; results stay alone on stdout."""
    print(f"next     {shown(command(*words))}", file=sys.stderr)


def beside(run: Path) -> Path:
    """Where a run, or a checkpoint file, is exported to: a file beside the run's folder."""
    folder = run.parent.parent if run.is_file() else run
    return folder.parent / f"{folder.resolve().name}.safetensors"
