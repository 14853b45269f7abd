"""Every call that touches a file of a run fails or is the last: one line, and the same end."""

from __future__ import annotations

import shutil

import pytest
from failing import WAYS, compiled, outcomes
from test_cli import ROOT


@pytest.fixture
def place(tmp_path):
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "base.yaml", tmp_path / "experiments")
    return tmp_path


def check(place, ways, sample=None):
    """Try the ways; a list of what was not as promised."""
    library = compiled(place)
    if library is None:
        pytest.skip("takes a C compiler and Linux's LD_PRELOAD")
    straight, found = outcomes(library, place, ways, sample)
    assert {each.way for each in found} == set(ways)
    return [
        (problem, each) for each in found for problem in [unlike(each, straight)] if problem
    ], found


def unlike(each, straight):
    """What of an outcome is not as promised; None where all is."""
    if each.way == "killed":
        ended = each.code == -9
    elif each.code == 0:  # what failed was not needed, or was tried again
        ended = True
    else:
        errors = [line for line in each.said if line.startswith("error: ")]
        ended = each.code == 2 and len(errors) == 1 and each.said[-1] == errors[0]
    if not ended or any("Traceback" in line for line in each.said):
        return "ended otherwise than in one line and with code 2"
    if each.broken:
        return "left a file that is not whole"
    if each.again != 0 or each.state != straight:
        return "did not come to the same end"
    return "left temporary files" if each.left else None


# At every place; what these do not show is tried at some.
EVERY = ("the disk is full within a write", "an error of the disk, once", "killed",
         "a read fails, once")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_which_any_call_on_a_file_fails_comes_to_the_same_end(way, place):
    wrong, found = check(place, [way], None if way in EVERY else 5)
    assert len(found) > 10
    assert not wrong


@pytest.mark.faults
def test_some_calls_on_files_that_fail(place):
    wrong, _ = check(place, ["the disk is full within a write", "killed"], sample=11)
    assert not wrong
