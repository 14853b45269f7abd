"""What `prepare` says of its progress to a file: a line every ten seconds, with what is left."""

from __future__ import annotations

import time

import pytest

from diffusion_pl import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_tell_the_rate_of_this_run_and_the_time_that_is_left(clock, capsys):
    with progress.reported() as report:
        clock[0] = 105.0
        report(600, 500, 2000)  # too soon after the beginning
        clock[0] = 110.0
        report(600, 400, 2000)
        clock[0] = 115.0
        report(600, 700, 2000)  # too soon after the line before
        clock[0] = 120.0
        report(600, 1000, 2000)
    out, lines = capsys.readouterr()
    # 400 images of this run in 10 s, 1,000 still to do; then 1,000 in 20 s, 400 to do.
    assert lines.splitlines() == [
        "prepare: 1,000 of 2,000 images, 40 images/s, 0:25 left",
        "prepare: 1,600 of 2,000 images, 50 images/s, 0:08 left",
    ]
    assert not out


def test_without_an_image_there_is_no_rate_to_tell(clock, capsys):
    with progress.reported() as report:
        clock[0] = 200.0
        report(600, 0, 2000)
    assert capsys.readouterr() == ("", "")


def test_a_person_sees_a_bar_that_counts_what_earlier_runs_did(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.reported() as report:
        report(600, 400, 2000)
    assert "1000/2000" in capsys.readouterr().err
