"""Thirty thousand spoilt files: each is refused in a line or read; nothing runs, hangs or grows.

Each group is read in a process of its own, so that what kills or fills a process is seen. `python
tests/mutations.py` prints the counts of every kind as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import COUNTS

GROUPS = {
    "pictures and texts": ("picture", "member", "config"),
    "archives and shards": (
        "archive", "cifar10", "arrays", "shard", "index", "manifest", "history",
    ),
    "weights": ("checkpoint", "signed", "weights", "converted", "edm"),
}  # fmt: skip
LIMIT = 600  # seconds of the clock; a group computes for 5 to 20, on a machine that others may use
MOST_BYTES = 2 * 1024**3
SOME = 0.2  # of the mutants in `make test`, all of them in `make test-slow`


def test_thirty_thousand_mutants_are_tried():
    assert sum(COUNTS.values()) >= 30_000
    assert sorted(COUNTS) == sorted(name for group in GROUPS.values() for name in group)


@pytest.mark.parametrize("share", [SOME, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("group", GROUPS)
def test_a_spoilt_file_is_refused_in_a_line_or_read(group, share):
    tests = Path(__file__).parent
    words = [tests / "mutations.py", *GROUPS[group], f"--share={share}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
        cwd=tests.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    faults = [fault for kind in told["kinds"].values() for fault in kind["faults"]]
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:20]])
    for name, kind in told["kinds"].items():
        assert kind["tried"] == int(share * COUNTS[name])
        assert kind["tried"] == kind["refused"] + kind["same"] + kind["other"]
        assert kind["refused"] > kind["tried"] // 4  # the damage reaches what decides
    assert told["peak"] < MOST_BYTES
