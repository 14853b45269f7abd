"""A run that was stopped anywhere ends at the bits of one that was not: weights, average, history.

The network tells its own process to stop, in a pass of its own choosing: in the middle of a step
that is accumulated, or while images of an evaluation are drawn. Ranks are forked from a process
that has imported everything, and meet as torchrun's do.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import traceback

import pytest
import torch
from test_cli import ROOT
from torch import multiprocessing

from diffusion_pl.cli import main
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.signals import MARKER, RESUMABLE
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History

OBJECTIVES = {
    "edm": "{_target_: diffusion_pl.objectives.edm.EDM}",
    "ddpm": "{_target_: diffusion_pl.objectives.ddpm.DDPM}",
    "simple": "{_target_: diffusion_pl.objectives.simple_diffusion.SimpleDiffusion, schedule: "
    "{_target_: diffusion_pl.objectives.shifted_cosine.ShiftedCosine, resolution: 64, reference: 32}}",
    "flow": "{_target_: diffusion_pl.objectives.rectified_flow.RectifiedFlow}",
}

RUN = """# Several resolutions, dropout, labels, flips: every random stream there is (no published number)
defaults: base
data:
  _target_: diffusion_pl.data.synthetic.Synthetic
  count: 40
  resolution: 16
  batch_size: 8
  shares: {8: 1, 16: 2}
  hflip: true
network:
  _target_: test_exact.Stopping
  resolution: 16
  classes: 8
  model_channels: 8
  channel_mult: [1, 2]
  blocks: 1
  attention: [8]
  dropout: 0.1
  augment: 9
augment: {_target_: diffusion_pl.data.augment.NonLeaky}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20, posthoc_every: 32}
sampler: {steps: 3, schedule: {sigma_min: 0.05, sigma_max: 20.0}}
features: {name: shapes}
evaluation: {every: 48, count: 40, batch_size: 16, grid: 9}
trainer:
  images: 96
  checkpoint_every: 64
  log_every: 24
  warmup: 40
  label_dropout: 0.2
  clip: 1.0
  accelerator: cpu
  loggers: []
objective: OBJECTIVE
"""


class Stopping(SongUNet):
    """Tells its process to stop at the pass whose number stands in the environment."""

    calls = 0

    def forward(self, x, c_noise, **condition):
        Stopping.calls += 1
        if str(Stopping.calls) == os.environ.get("STOP_AT_PASS"):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x, c_noise, **condition)


def one_rank(rank, world_size, port, place, words, stop):
    """What each process of a run does; its exit code is the command's."""
    torch.set_num_threads(1)
    os.chdir(place)
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                       "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "TORCHELASTIC_RUN_ID": "exact"}  # fmt: skip
    if stop is not None and rank == world_size - 1:  # the last one is told, all stop
        os.environ["STOP_AT_PASS"] = str(stop)
    try:
        code = main(["train", "exact", *words])
    except BaseException:
        traceback.print_exc()
        os._exit(99)
    os._exit(code)


def train(place, run, *words, ranks=1, stop=None):
    """Train in new processes, forked from one that has imported everything; their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "diffusion_pl.commands.train"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--run", f"runs/{run}", f"trainer.devices={ranks}", *words]
    processes = [
        context.Process(target=one_rank, args=(rank, ranks, port, str(place), words, stop))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    (folder / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "base.yaml", folder / "experiments")
    return folder


def written(place, objective):
    text = RUN.replace("OBJECTIVE", OBJECTIVES[objective])
    (place / "experiments" / "exact.yaml").write_text(text)


def ended(place, run):
    """What a run leaves: weights, averages, optimizer, history, averages to be combined.

    Not times, and not Lightning's count of its own loops, which begin anew with each process.
    """
    folder = place / "runs" / run
    loaded = checkpoints.load(checkpoints.latest(folder / "checkpoints"))
    loaded = {key: value for key, value in loaded.items() if key not in ("epoch", "loops")}
    timed = ("seconds", "images_per_second", "commit")
    history = [
        {key: value for key, value in row.items() if key not in timed}
        for row in History(folder / "metrics.jsonl").rows()
    ]
    snapshots = {path.name: path.read_bytes() for path in (folder / "posthoc").iterdir()}
    return loaded, history, snapshots


def assert_equal(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}[{number}]")
    else:
        assert one == other or one != one, (where, one, other)


def words_of(precision, workers, accumulation, ranks):
    return [
        f"trainer.precision={precision}",
        f"data.workers={workers}",
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
    written(place, objective)
    name = f"{objective}-{precision}-{workers}-{accumulation}-{ranks}"
    words = words_of(precision, workers, accumulation, ranks)
    assert train(place, f"{name}-straight", *words, ranks=ranks) == [0] * ranks
    # In the second or third step, within the first row of the log. What an evaluation will cost
    # takes the first process two passes.
    stopped = train(place, name, *words, ranks=ranks, stop=5 if ranks == 1 else 3)
    assert set(stopped) <= {0, RESUMABLE} and RESUMABLE in stopped
    assert (place / "runs" / name / MARKER).exists()
    at = int(checkpoints.latest(place / "runs" / name / "checkpoints").stem)
    assert 8 <= at <= 24
    assert train(place, name, *words, ranks=ranks) == [0] * ranks
    assert not (place / "runs" / name / MARKER).exists()
    assert_equal(ended(place, f"{name}-straight"), ended(place, name))


@pytest.fixture(scope="module")
def straight(place):
    written(place, "edm")
    assert train(place, "straight") == [0]
    return ended(place, "straight")


# Two passes to know the cost, six steps, an evaluation of 3 batches with 5 passes each, six steps.
@pytest.mark.parametrize("stop", [1, 8, 9, 23, 26])
def test_stopped_at_any_pass_of_steps_and_evaluations(stop, place, straight):
    name = f"at-{stop}"
    assert train(place, name, stop=stop) == [RESUMABLE]
    assert train(place, name) == [0]
    assert_equal(straight, ended(place, name))


def test_stopped_again_and_again(place, straight):
    codes = [train(place, "often", stop=6)[0] for _ in range(3)]
    assert codes == [RESUMABLE] * 3
    assert train(place, "often") == [0]
    assert_equal(straight, ended(place, "often"))


def test_stopped_in_the_last_evaluation_has_lost_no_step_and_only_measures_again(place, straight):
    # Two passes to know the cost, 12 steps, and 15 passes of the evaluation in their middle; then those of the last.
    assert train(place, "last", stop=2 + 12 + 15 + 7) == [RESUMABLE]
    before = checkpoints.latest(place / "runs" / "last" / "checkpoints")
    assert int(before.stem) == 96
    written_at = before.stat().st_mtime_ns
    assert train(place, "last") == [0]
    assert before.stat().st_mtime_ns == written_at
    assert_equal(straight, ended(place, "last"))


def test_an_evaluation_stops_on_all_ranks_whoever_was_told(place):
    written(place, "edm")
    assert train(place, "two-straight", ranks=2) == [0, 0]
    # Rank 1 has one of the two tiles: six steps, then 2 batches of images.
    codes = train(place, "two", ranks=2, stop=6 + 3)
    assert set(codes) <= {0, RESUMABLE} and RESUMABLE in codes
    assert not [row for row in History(place / "runs" / "two" / "metrics.jsonl").rows()
                if "name" in row]  # fmt: skip
    assert train(place, "two", ranks=2) == [0, 0]
    assert_equal(ended(place, "two-straight"), ended(place, "two"))


def test_the_batch_is_the_same_however_it_is_spread(place):
    # Rounding alone differs: with a rate that Adam cannot blow up, 1e-6 after 200 steps.
    written(place, "edm")
    common = ["trainer.images=1600", "network.dropout=0.0", "optimizer.lr=1e-4",
              "optimizer.eps=1e-3", "evaluation.every=100000", "trainer.checkpoint_every=800",
              "trainer.keep=3", "ema.posthoc_every=1600", "evaluation.count=32"]  # fmt: skip
    spread = {
        "one": ([], 1),
        "passes": (["trainer.device_batch_size=3"], 1),
        "ranks": ([], 2),
    }
    for name, (words, ranks) in spread.items():
        assert train(place, f"spread-{name}", *common, *words, ranks=ranks) == [0] * ranks
    runs = {name: ended(place, f"spread-{name}")[0] for name in spread}
    # One process goes on from the middle of what two began.
    half = place / "runs" / "spread-change"
    shutil.copytree(place / "runs" / "spread-ranks", half)
    (half / "checkpoints" / "000000001600.ckpt").unlink()
    checkpoints.point_to(half / "checkpoints" / "000000000800.ckpt")
    text = (half / "config.yaml").read_text()
    (half / "config.yaml").write_text(text.replace("devices: 2", "devices: 1"))
    assert train(place, "spread-change", *common) == [0]
    runs["change"] = ended(place, "spread-change")[0]
    whole = runs.pop("one")
    assert whole["global_step"] == 200
    for name, other in runs.items():
        for key, value in whole["state_dict"].items():
            difference = (other["state_dict"][key] - value).abs().max()
            assert difference < 1e-6, (name, key, float(difference))
