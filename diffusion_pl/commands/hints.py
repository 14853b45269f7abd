"""The command to type next, as it is typed in this folder."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

_CLASSES = 8  # named


def interpreter() -> str:
    """The path of this Python, quoted for a shell."""
    program = Path(sys.executable or "python")
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.quote(str(program))


def command(*words: object) -> str:
    """A command of this package, quoted for a shell."""
    return f"{interpreter()} -m diffusion_pl {shlex.join(map(str, words))}"


def next_line(*words: object) -> str:
    """The last line of a command's output: what to type next."""
    return f"next     {command(*words)}"


def sample(run: Path) -> str:
    """The command that samples from a run; `make` in a checkout, unless the path needs quoting."""
    name = str(run)
    if not re.fullmatch(r"[\w./+,@:=-]+", name) or not _in_checkout():
        return command("sample", name, "--count", 64)
    return f"make sample RUN={name} COUNT=64"


def _in_checkout() -> bool:
    """Whether the Makefile here has this package's commands."""
    try:
        return " -m diffusion_pl sample " in Path("Makefile").read_text()
    except (OSError, ValueError):
        return False


def classes(names: Sequence[str]) -> str:
    """The names of a model's classes, the first of many, and the option that chooses one."""
    more = ", ..." if len(names) > _CLASSES else ""
    one = shlex.quote(names[0])
    return f"{', '.join(names[:_CLASSES])}{more} ({len(names):,}; one of them: --label {one})"


def beside(run: Path) -> Path:
    """The path for a run's export: a file beside the run's folder."""
    folder = run.parent.parent if run.is_file() else run
    return folder.parent / f"{folder.resolve().name}.safetensors"
