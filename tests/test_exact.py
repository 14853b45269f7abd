"""A run that was stopped anywhere ends at the bits of one that was not: weights, average, history.

The network tells its own process to stop, in a pass of its own choosing: in the middle of a step
that is accumulated, or while images of an evaluation are drawn.
"""

from __future__ import annotations

import itertools
import shutil

import pytest
from faults import EDM, assert_equal, left, marked, newest, write
from started import train
from test_cli import ROOT

from diffusion_pl.signals import RESUMABLE
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History

pytestmark = pytest.mark.faults

OBJECTIVES = {
    "edm": EDM,
    "ddpm": "{_target_: diffusion_pl.objectives.ddpm.DDPM}",
    "simple": "{_target_: diffusion_pl.objectives.simple_diffusion.SimpleDiffusion, schedule: "
    "{_target_: diffusion_pl.objectives.shifted_cosine.ShiftedCosine, resolution: 64, "
    "reference: 32}}",
    "flow": "{_target_: diffusion_pl.objectives.rectified_flow.RectifiedFlow}",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    (folder / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "base.yaml", folder / "experiments")
    return folder


def last(ranks, at):
    """That the last rank is told to stop at one of its passes."""
    return {ranks - 1: f"TERM:{at}"}


def words_of(precision, workers, accumulation, ranks):
    return [
        f"trainer.precision={precision}",
        f"data.num_workers={workers}",
        f"trainer.device_batch_size={8 // ranks // accumulation}",
    ]


# Every value meets every number of ranks, of passes and both precisions; `make test-slow` has all.
PAIRWISE = [
    ("edm", "fp32", 0, 1, 1),
    ("edm", "bf16", 2, 2, 2),
    ("ddpm", "bf16", 1, 1, 1),
    ("ddpm", "fp32", 2, 2, 1),
    ("simple", "fp32", 1, 2, 2),
    ("simple", "bf16", 0, 1, 1),
    ("flow", "fp32", 2, 1, 2),
    ("flow", "bf16", 0, 2, 1),
]
EVERY = list(itertools.product(OBJECTIVES, ("fp32", "bf16"), (0, 1, 2), (1, 2), (1, 2)))
CASES = [*PAIRWISE, *(pytest.param(*case, marks=pytest.mark.slow)
                      for case in EVERY if case not in PAIRWISE)]  # fmt: skip


@pytest.mark.parametrize(("objective", "precision", "workers", "accumulation", "ranks"), CASES)
def test_stopped_in_a_step_and_gone_on_is_the_run_that_was_not(
    objective, precision, workers, accumulation, ranks, place
):
    write(place, OBJECTIVES[objective])
    name = f"{objective}-{precision}-{workers}-{accumulation}-{ranks}"
    words = words_of(precision, workers, accumulation, ranks)
    assert train(place, f"{name}-straight", *words, ranks=ranks).codes == [0] * ranks
    # In the second or third step, within the first row of the log. What an evaluation will cost
    # takes the first process two passes.
    stopped = train(place, name, *words, ranks=ranks, faults=last(ranks, 5 if ranks == 1 else 3))
    assert set(stopped.codes) <= {0, RESUMABLE} and RESUMABLE in stopped.codes
    assert marked(place, name)
    assert 8 <= int(newest(place, name).stem) <= 24
    assert train(place, name, *words, ranks=ranks).codes == [0] * ranks
    assert not marked(place, name)
    assert_equal(left(place, f"{name}-straight"), left(place, name))


@pytest.fixture(scope="module")
def straight(place):
    write(place)
    assert train(place, "straight").codes == [0]
    return left(place, "straight")


# Two passes to know the cost, six steps, an evaluation of 3 batches with 5 passes each, six steps.
@pytest.mark.parametrize("stop", [1, 8, 9, 23, 26])
def test_stopped_at_any_pass_of_steps_and_evaluations(stop, place, straight):
    name = f"at-{stop}"
    assert train(place, name, faults=last(1, stop)).codes == [RESUMABLE]
    assert train(place, name).codes == [0]
    assert_equal(straight, left(place, name))


def test_stopped_again_and_again(place, straight):
    for _ in range(3):
        assert train(place, "often", faults=last(1, 6)).codes == [RESUMABLE]
    assert train(place, "often").codes == [0]
    assert_equal(straight, left(place, "often"))


def test_stopped_in_the_last_evaluation_has_lost_no_step_and_only_measures_again(place, straight):
    # Two passes to know the cost, 12 steps, 15 passes of the evaluation between; then the last one.
    faults = last(1, 2 + 12 + 15 + 7)
    assert train(place, "last", faults=faults).codes == [RESUMABLE]
    before = newest(place, "last")
    assert int(before.stem) == 96
    written_at = before.stat().st_mtime_ns
    assert train(place, "last").codes == [0]
    assert before.stat().st_mtime_ns == written_at
    assert_equal(straight, left(place, "last"))


def test_an_evaluation_stops_on_all_ranks_whoever_was_told(place):
    write(place)
    assert train(place, "two-straight", ranks=2).codes == [0, 0]
    # Rank 1 has the shorter one of the two tiles: six steps, then five passes.
    codes = train(place, "two", ranks=2, faults=last(2, 6 + 3)).codes
    assert set(codes) <= {0, RESUMABLE} and RESUMABLE in codes
    assert not [row for row in History(place / "runs" / "two" / "metrics.jsonl").rows()
                if "name" in row]  # fmt: skip
    assert train(place, "two", ranks=2).codes == [0, 0]
    assert_equal(left(place, "two-straight"), left(place, "two"))


def test_the_batch_is_the_same_however_it_is_spread(place):
    # Rounding alone differs: with a rate that Adam cannot blow up, 1e-6 after 100 steps.
    write(place)
    common = ["trainer.total_images=800", "network.dropout=0.0", "optimizer.lr=1e-4",
              "optimizer.eps=1e-3", "evaluation.every=100000", "trainer.checkpoint_every=400",
              "trainer.keep=3", "ema.posthoc_every=800", "evaluation.count=32"]  # fmt: skip
    spread = {
        "one": ([], 1),
        "passes": (["trainer.device_batch_size=3"], 1),
        "ranks": ([], 2),
    }
    for name, (words, ranks) in spread.items():
        assert train(place, f"spread-{name}", *common, *words, ranks=ranks).codes == [0] * ranks
    runs = {name: left(place, f"spread-{name}")[0] for name in spread}
    # One process goes on from the middle of what two began.
    half = place / "runs" / "spread-change"
    shutil.copytree(place / "runs" / "spread-ranks", half)
    (half / "checkpoints" / "000000000800.ckpt").unlink()
    checkpoints.point_to(half / "checkpoints" / "000000000400.ckpt")
    assert train(place, "spread-change", *common).codes == [0]
    runs["change"] = left(place, "spread-change")[0]
    whole = runs.pop("one")
    assert whole["global_step"] == 100
    for name, other in runs.items():
        for key, value in whole["state_dict"].items():
            difference = (other["state_dict"][key] - value).abs().max()
            assert difference < 1e-6, (name, key, float(difference))
