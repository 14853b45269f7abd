"""`make bench-compare`: two revisions of a toy repository, measured in turn."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.builds import Ratio, compared, numbers, table, worktree

TOY = """
import json, pathlib
folder = pathlib.Path(__file__).parent / "results"
folder.mkdir(exist_ok=True)
figures = {"a, us": %s, "b": {"images/s": [%s, 10]}, "same": 3.0, "only": {%s}}
(folder / "toy-cpu.json").write_text(json.dumps({"figures": figures}))
"""


def git(folder: Path, *words: str) -> None:
    named = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run(["git", *named, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A first revision `base`, a second, and a change that is not committed."""
    root = tmp_path / "toy"
    (root / "benchmarks").mkdir(parents=True)
    (root / "benchmarks" / "__init__.py").write_text("")
    git(root, "init", "-q")
    for tag, code in (("base", TOY % (100, 50, '"old": 1')), ("next", TOY % (100, 50, ""))):
        (root / "benchmarks" / "toy.py").write_text(code)
        git(root, "add", ".")
        git(root, "commit", "-q", "-m", tag)
        git(root, "tag", tag)
    (root / "benchmarks" / "toy.py").write_text(TOY % (130, 40, '"new": 1'))
    return root


def test_every_number_that_both_have_is_compared(repository):
    found = {each.name: each for each in compared(repository, "base", ["toy"], 3)}
    assert set(found) == {
        "toy: a, us", "toy: b: images/s[0]", "toy: b: images/s[1]", "toy: same",
    }  # fmt: skip
    assert found["toy: a, us"].rounds == pytest.approx((1.3,) * 3)
    assert found["toy: b: images/s[0]"].rounds == pytest.approx((0.8,) * 3)
    assert [name for name, each in found.items() if each.fallen] == [
        "toy: a, us", "toy: b: images/s[0]",
    ]  # fmt: skip
    # Nothing is left behind, and this build's own records are not touched.
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout
    assert len(listed.splitlines()) == 1 and not (repository / "benchmarks" / "results").exists()


def test_a_fall_is_more_than_a_tenth_in_every_round():
    assert Ratio("t", (1.2, 1.11, 1.5), False).fallen
    assert not Ratio("t", (1.2, 1.09, 1.5), False).fallen
    assert Ratio("t", (0.8, 0.9, 0.7), True).fallen
    assert not Ratio("t", (0.8, 0.95, 0.7), True).fallen
    assert not Ratio("t", (0.5, 0.5), False).fallen and not Ratio("t", (2.0, 2.0), True).fallen
    [line] = table([Ratio("t", (1.2, 1.11, 1.5), False)])
    assert line == "t   1.200  (1.110 to 1.500)  FALLEN"


def test_numbers_are_found_wherever_they_stand():
    figures = {"a": 1, "b": {"c": [2.5, {"d": 3}], "e": "text", "f": True, "g": None}}
    assert dict(numbers(figures)) == {"a": 1, "b: c[0]": 2.5, "b: c[1]: d": 3}


def test_no_such_revision_and_a_failure_are_said(repository):
    with pytest.raises(SystemExit, match="no worktree of nowhere"), worktree(repository, "nowhere"):
        pass
    (repository / "benchmarks" / "toy.py").write_text("raise ValueError('as it is meant')")
    with pytest.raises(SystemExit, match="toy failed in .*\n(.*\n)*.*as it is meant"):
        compared(repository, "base", ["toy"], 1)
    (repository / "benchmarks" / "toy.py").write_text("")
    with pytest.raises(SystemExit, match="toy wrote 0 records"):
        compared(repository, "base", ["toy"], 1)
