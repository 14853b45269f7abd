"""What a planted bug is; the lists stand in mutants.py and mutants_*.py."""

from __future__ import annotations

from dataclasses import dataclass

PACKAGE = "diffusion_pl"


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


def at(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    """Mutants of one file, noticed by the same tests."""
    names = tuple(f"tests/test_{name}.py" for name in tests.split())
    return [Mutant(f"{PACKAGE}/{file}", right, wrong, names) for right, wrong in changes]
