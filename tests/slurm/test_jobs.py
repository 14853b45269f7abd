"""The job that `launch` writes, on a real SLURM of two nodes: whatever hits it, it ends at one bit.

Every run of this file is of two ranks, one a node, from the same experiment. `straight` is left
alone; the others are stopped, killed, or lose a machine, come back by themselves, and must end with
the weights, averages and optimizer of `straight`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cluster import Absent, Cluster
from test_cli import ROOT, TINY

from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History

pytestmark = pytest.mark.slurm

STEPS = 120
LONG = 12_000  # steps that take longer than a stretch
EXPERIMENT = (
    TINY.replace("evaluation: {every: 16, count: 20", "evaluation: {every: 8000, count: 4")
    .replace("batch_size: 10, grid: 9}", "batch_size: 4, grid: 4, metrics: []}")
    .replace("images: 32, checkpoint_every: 8", f"images: {8 * STEPS}, checkpoint_every: 80")
    .replace("log_every: 8,", "log_every: 8, loggers: [],")
)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
LIMIT = 300  # seconds for a job and its restarts


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(Cluster(tmp_path_factory.mktemp("slurm")))
        except Absent as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the experiment, which both nodes see."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "base.yaml", folder / "experiments")
    (folder / "experiments" / "tiny.yaml").write_text(EXPERIMENT)
    return folder


@pytest.fixture(scope="module")
def launch(cluster, place):
    """Type `launch` and give the job's number."""

    def call(run, *words, each=("--tasks", "1")):
        command = [sys.executable, "-m", "diffusion_pl", "launch", "tiny", "--run", f"runs/{run}"]
        command += ["--nodes", "2", *each, "--time", "10", *words]
        done = subprocess.run(
            command, cwd=place, env=cluster.env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    return call


@pytest.fixture(scope="module")
def straight(cluster, place, launch):
    """The run that is left alone."""
    job = launch("straight")
    began = time.monotonic()
    assert ended(cluster, place, "straight", job) == "COMPLETED", log(place, "straight")
    print(f"straight: {time.monotonic() - began:.1f} s")
    return state(place, "straight")


def ended(cluster, place, run, job, limit=LIMIT):
    """Wait for the end of a job, and say how it ended."""
    try:
        cluster.until(lambda: cluster.state(job) in ENDED, limit)
    except TimeoutError as error:
        raise AssertionError(log(place, run)) from error
    return cluster.state(job)


def begun(cluster, place, run, job):
    """Wait until a run has a checkpoint and steps after it."""
    latest = place / "runs" / run / "checkpoints" / "latest"
    try:
        cluster.until(lambda: latest.exists() or cluster.state(job) in ENDED, LIMIT)
    except TimeoutError as error:
        raise AssertionError(log(place, run)) from error
    assert cluster.state(job) == "RUNNING", log(place, run)


def assert_equal(one, other):
    """Equal to the last bit, whatever contains what."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


def log(place, run):
    return "\n".join(file.read_text() for file in (place / "runs" / run).rglob("slurm-*.out"))


def state(place, run):
    loaded = checkpoints.load(checkpoints.latest(place / "runs" / run / "checkpoints"))
    return loaded["global_step"], loaded["state_dict"], loaded["optimizer_states"]


def restarts(cluster, job):
    """How often SLURM has started a job again."""
    words = cluster.said("scontrol", "-o", "show", "job", job).split()
    return int(
        next(word for word in words if word.startswith("Restarts=")).removeprefix("Restarts=")
    )


def tasks_of(job, rank):
    """The processes of one rank of a job."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
        if wanted <= set(variables) and b"train" in words and b"srun" not in words[0]:
            found.append(int(folder.name))
    return found


def hit(cluster, place, launch, run, fault):
    """Submit a run, hit it in the middle, and see it end as if nothing had been."""
    job = launch(run)
    begun(cluster, place, run, job)
    began = time.monotonic()
    fault(job)
    cluster.until(lambda: cluster.state(job) != "RUNNING" or restarts(cluster, job), 60)
    cluster.until(lambda: cluster.state(job) == "RUNNING" and restarts(cluster, job), 60)
    back = time.monotonic() - began
    assert ended(cluster, place, run, job) == "COMPLETED", log(place, run)
    print(f"{run}: back after {back:.1f} s, done after {time.monotonic() - began:.1f} s")
    assert restarts(cluster, job) == 1
    images = [row["images"] for row in History(place / "runs" / run / "metrics.jsonl").rows()]
    assert images == sorted(set(images))  # no row of the log twice
    return state(place, run)


def test_a_job_trains_to_the_end(straight, place):
    assert straight[0] == STEPS
    said = log(place, "straight")
    assert said.count("run      runs/straight  (960 images)") == 1, said  # one rank speaks
    assert not (place / "runs" / "straight" / "REQUEUE").exists()


def test_a_signal_before_the_limit_costs_no_step(cluster, place, launch, straight):
    # What `make preempt JOB=` types.
    result = hit(
        cluster, place, launch, "usr1", lambda job: cluster.said("scancel", "--signal=USR1", job)
    )
    assert_equal(result, straight)
    said = log(place, "usr1")
    stopped = said.split("usr1: stopped at ")[1].split()[0]
    assert f"going on from {stopped} of 960 images" in said  # nothing done twice
    assert said.count("stopped at") == said.count("going on from") == 1


def test_a_killed_task_brings_the_job_back(cluster, place, launch, straight):
    def kill(job):
        (process,) = tasks_of(job, rank=1)
        os.kill(process, signal.SIGKILL)

    assert_equal(hit(cluster, place, launch, "killed", kill), straight)
    assert "without a mark" in log(place, "killed")


def test_a_lost_node_brings_the_job_back(cluster, place, launch, straight):
    def lose(job):
        cluster.said("scontrol", "update", "nodename=127.0.0.2", "state=down", "reason=test")
        cluster.until(lambda: cluster.state(job) != "RUNNING", 60)
        # It answers, so SLURM takes it back by itself.
        cluster.until(lambda: cluster.said("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", 60)

    assert_equal(hit(cluster, place, launch, "lost", lose), straight)


def test_a_cancelled_job_stays_away_and_the_run_goes_on_when_asked(
    cluster, place, launch, straight
):
    job = launch("cancelled")
    begun(cluster, place, "cancelled", job)
    cluster.said("scancel", job)
    assert ended(cluster, place, "cancelled", job) == "CANCELLED"
    time.sleep(2)
    assert cluster.state(job) == "CANCELLED"
    script = place / "runs" / "cancelled" / "job.sbatch"
    again = cluster.said("sbatch", "--parsable", script)
    assert ended(cluster, place, "cancelled", again) == "COMPLETED", log(place, "cancelled")
    assert_equal(state(place, "cancelled"), straight)


def test_a_job_that_misses_its_gpus_says_so_and_does_not_come_back(cluster, place, launch):
    if torch.cuda.device_count():
        pytest.skip("this machine has GPUs")
    cluster.pretend_gpus(2)
    # SLURM takes what the script asks for.
    job = launch("gpus", "trainer.accelerator=auto", each=("--gpus", "2"))
    assert ended(cluster, place, "gpus", job) == "FAILED"
    assert "the tasks of a node need 2 GPUs (this one shows 0)" in log(place, "gpus")
    assert restarts(cluster, job) == 0
    cluster.pretend_gpus(0)


@pytest.mark.slow
def test_a_job_goes_on_over_the_limits_of_its_time(cluster, place, launch, straight):
    """SLURM itself sends the signal, a minute or two before a limit of three."""
    job = launch("long", f"trainer.total_images={8 * LONG}", "--time", "3", "--margin", "60")
    assert ended(cluster, place, "long", job, limit=1800) == "COMPLETED", log(place, "long")
    print(f"long: {restarts(cluster, job)} restarts")
    assert restarts(cluster, job) >= 1
    whole = launch("whole", f"trainer.total_images={8 * LONG}", "--time", "60")
    assert ended(cluster, place, "whole", whole, limit=1800) == "COMPLETED", log(place, "whole")
    assert restarts(cluster, whole) == 0
    assert_equal(state(place, "long"), state(place, "whole"))


@pytest.mark.slow
def test_a_swept_job_is_an_array_whose_tasks_requeue_alone(cluster, place, launch):
    job = launch("sweep", "--sweep", "seed=1,2", "--time", "30")
    runs = [f"sweep/seed={seed}" for seed in (1, 2)]
    begun(cluster, place, runs[1], f"{job}_1")
    cluster.said("scancel", "--signal=USR1", f"{job}_1")
    for number, run in enumerate(runs):
        assert ended(cluster, place, "sweep", f"{job}_{number}") == "COMPLETED"
        assert restarts(cluster, f"{job}_{number}") == number
        assert state(place, run)[0] == STEPS
    alone = launch("alone", "seed=2", "--time", "30")
    assert ended(cluster, place, "alone", alone) == "COMPLETED"
    assert_equal(state(place, runs[1]), state(place, "alone"))


@pytest.mark.slow
def test_a_run_that_always_crashes_is_tried_three_times_more(cluster, place, launch):
    job = launch("crash", "trainer.loggers=[wandb]")
    assert ended(cluster, place, "crash", job, limit=600) == "FAILED"
    assert restarts(cluster, job) == 4
    assert "3 restarts without progress" in log(place, "crash")
