"""The check that CI makes of its CIFAR-10 number: what it lets pass and what not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import cifar10_ci


def test_the_interval_holds_one_more_run_in_99_of_100_cases():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(4000):
        *seeds, one_more = rng.normal(10, 2, 6)
        low, high = cifar10_ci.interval(seeds)
        held += low <= one_more <= high
    assert held / 4000 == pytest.approx(0.99, abs=0.005)  # a standard error is 0.0016


@pytest.fixture
def known(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    number = {"interval": [4.0, 6.0], "mean": 5.0, "values": [5.0] * 5, "fingerprint": "a"}
    other = {**number, "interval": [1.0, 2.0]}
    numbers = {"fd@1/x/shapes": number, "fd@1/x/pixels": other}
    path.write_text(json.dumps({"y": {"numbers": {}}, "x": {"numbers": numbers}}))
    monkeypatch.setattr(cifar10_ci, "RECORD", path)


def row(name, value, fingerprint="a"):
    return {"name": name, "value": value, "fingerprint": fingerprint, "whole_seconds": 1}


@pytest.mark.parametrize(
    ("rows", "passes"),
    [
        ([row("fd@1/x/shapes", 5.0), row("fd@1/x/pixels", 1.5)], True),
        ([row("fd@1/x/shapes", 3.9), row("fd@1/x/pixels", 1.5)], False),  # too good is wrong too
        ([row("fd@1/x/shapes", 5.0), row("fd@1/x/pixels", 2.1)], False),
        ([row("fd@1/x/shapes", float("nan"))], False),
        ([row("fd@1/x/shapes", 5.0, "b")], False),  # other images: nothing was compared
        ([row("fd@1/x/shapes", 5.0), row("fid@1/x/inception", 99.0)], True),
    ],
)
def test_every_number_that_has_an_interval_must_lie_in_it(known, capsys, rows, passes):
    assert cifar10_ci.report("ci-fid", rows) is passes
    said = capsys.readouterr().out
    assert ("OUTSIDE" in said) is (not passes and rows[-1]["fingerprint"] == "a")


def test_bugs_are_planted_where_they_say():
    for file, right, wrong in cifar10_ci.BUGS.values():
        text = (cifar10_ci.ROOT / "diffusion_pl" / file).read_text()
        assert text.count(right) == 1
        assert text.count(wrong) == 0
