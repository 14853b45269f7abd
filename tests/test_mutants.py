"""The planted bugs can be planted: their code is there, once, and so are the tests to notice them.

Whether they are noticed is tried by `make mutants`, which takes hours.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutant import PACKAGE
from mutants import ROOT, everything

# Folders whose files decide something each; of the others `make mutants` has what is a formula.
COVERED = ("networks", "data", "commands", "config", "interop")


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """The files that bugs are planted in, "" for one that is not there."""
    files = {ROOT / mutant.file for mutant in everything()}
    return {str(f.relative_to(ROOT)): f.read_text() if f.is_file() else "" for f in files}


def test_the_code_that_a_planted_bug_replaces_stands_once_in_its_file(texts):
    stale = {
        f"{mutant.file}: {mutant.right!r} stands {texts[mutant.file].count(mutant.right)} times"
        for mutant in everything()
        if texts[mutant.file].count(mutant.right) != 1
    }
    assert not stale


def test_a_planted_bug_changes_the_code(texts):
    assert not [mutant for mutant in everything() if mutant.right == mutant.wrong]


def test_a_planted_bug_leaves_a_file_that_python_can_read(texts):
    # One that cannot be read turns every test red and says nothing about any.
    broken = []
    for mutant in (each for each in everything() if each.file.endswith(".py")):
        text = texts[mutant.file].replace(mutant.right, mutant.wrong)
        try:
            ast.parse(text)
        except SyntaxError as error:
            broken.append(f"{mutant.file}: {mutant.right!r} -> {mutant.wrong!r}: {error}")
    assert not broken


def test_the_tests_of_a_planted_bug_are_there():
    named = {Path(test) for mutant in everything() for test in mutant.tests}
    assert not [str(path) for path in sorted(named) if not (ROOT / path).is_file()]


def test_every_file_that_decides_something_has_a_planted_bug():
    # An __init__.py holds a line about its folder and names of others: nothing to be wrong.
    files = {
        file.relative_to(ROOT).as_posix()
        for folder in COVERED
        for file in (ROOT / PACKAGE / folder).rglob("*.py")
        if file.name != "__init__.py"
    }
    assert files > {f"{PACKAGE}/data/order.py", f"{PACKAGE}/commands/sample.py"}
    assert not files - {mutant.file for mutant in everything()}
