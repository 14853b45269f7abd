"""The command that comes next, as it is typed from here."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

_CLASSES = 8  # named


def interpreter() -> str:
    """This Python as it is typed from here, quoted for a shell."""
    program = Path(sys.executable or "python")
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.quote(str(program))


def command(*words: object) -> str:
    """A command of this package, quoted for a shell."""
    return f"{interpreter()} -m diffusion_pl {shlex.join(map(str, words))}"


def next_line(*words: object) -> str:
    """What to type next, as the last line of a command."""
    return f"next     {command(*words)}"


def sample(run: Path) -> str:
    """What to type for images of a run: by make in a checkout, where a folder's name lets it.

    Make would read a $ in it and split it at a space, however it is quoted.
    """
    name = str(run)
    if not re.fullmatch(r"[\w./+,@:=-]+", name) or not _in_checkout():
        return command("sample", name, "--count", 64)
    return f"make sample RUN={name} COUNT=64"


def _in_checkout() -> bool:
    """Whether make knows this package's commands here."""
    try:
        return " -m diffusion_pl sample " in Path("Makefile").read_text()
    except (OSError, ValueError):
        return False


def classes(names: Sequence[str]) -> str:
    """The classes of a model by name, the first of many, and how one alone is drawn."""
    more = ", ..." if len(names) > _CLASSES else ""
    one = shlex.quote(names[0])
    return f"{', '.join(names[:_CLASSES])}{more} ({len(names):,}; of one alone: --label {one})"


def beside(run: Path) -> Path:
    """Where a run, or a checkpoint file, is exported to: a file beside the run's folder."""
    folder = run.parent.parent if run.is_file() else run
    return folder.parent / f"{folder.resolve().name}.safetensors"
