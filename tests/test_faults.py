"""Every kind of fault: all processes end soon, with a truthful code, and the run ends bit-equal."""

from __future__ import annotations

import random
import re
import shutil

import pytest
from faults import KINDS, assert_equal, at, befallen, left, marked, newest, spoil, write
from started import train
from test_cli import ROOT

from diffusion_pl.signals import RESUMABLE

pytestmark = pytest.mark.faults

# Of two ranks: seconds from the end of one to that of the other, which waits for it 15 seconds.
BOUND = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    (folder / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "base.yaml", folder / "experiments")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def straight(place):
    """By whether there are reading processes, which changes the config alone."""
    found = {}
    for words in ((), ("data.num_workers=1",)):
        name = "-".join(["straight", *words])
        assert train(place, name, *words, ranks=2).codes == [0, 0]
        found[words] = left(place, name)
    assert_equal(found[()][0]["state_dict"], found[words][0]["state_dict"])
    return found


# What one rank is told the others hear; that all are told at once is tried with one signal here.
ALIKE = {f"{name} to all ranks" for name in ("USR1", "INT", "HUP")}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in KINDS],
)
def test_a_run_survives(name, place, straight):
    kind, source = KINDS[name], random.Random(name)
    run = re.sub(r"[^a-zA-Z0-9]+", "-", name)
    faults = {rank: f"{kind.fault}:{at(kind, 2, source)}" for rank in befallen(kind, 2, source)}
    ended = train(place, run, *kind.words, ranks=2, faults=faults)
    assert set(ended.codes) <= set(kind.codes), (faults, ended)
    assert ended.codes.count(None) <= 1 and ended.codes != [0, 0], (faults, ended)
    assert ended.seconds < BOUND
    assert marked(place, run) is kind.marked
    if kind.damage:
        spoil(newest(place, run), source)
    assert train(place, run, *kind.words, ranks=2).codes == [0, 0]
    assert not marked(place, run)
    assert_equal(straight[kind.words], left(place, run))


def test_a_hang_while_the_last_evaluation_is_made_up_ends(place, straight):
    # Stopped in the last evaluation, then hung in its repetition, which no step precedes.
    passes = 2 + 12 + 15
    assert train(place, "again", faults={0: f"TERM:{passes + 7}"}).codes == [RESUMABLE]
    ended = train(place, "again", faults={0: "hang:4"})
    assert ended.codes == [1]
    assert train(place, "again").codes == [0]


def test_a_hang_before_the_first_step_ends(place):
    # In the second pass that tells what an evaluation will cost.
    ended = train(place, "early", "trainer.start_timeout=8", faults={0: "hang:2"})
    assert ended.codes == [1]


def test_weights_that_draw_nothing_finite_fail_the_run(place):
    ended = train(place, "unfit", faults={0: f"nan:{2 + 6 + 3}"})
    assert ended.codes == [1]
