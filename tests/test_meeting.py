"""Who started a rank and where the ranks meet: what is left over is one line, at once."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from faults import write
from homes import ROOT

from diffusion_pl.cli import main
from diffusion_pl.training.meeting import check_address, port_of, starter

JOB = {"SLURM_JOB_ID": "4242", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
BATCH = JOB | {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "train"}
TASK = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "nodes", "devices", "by"),
    [
        ({}, 1, 1, "itself"),
        ({}, 1, 4, "itself"),
        (JOB, 1, 1, "itself"),  # a notebook in a job, one device
        (JOB | {"SLURM_JOB_NAME": "bash"}, 1, 4, "itself"),
        (JOB | {"SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "bash"}, 1, 4, "itself"),  # srun --pty bash
        ({"SLURM_JOB_ID": "4242"}, 1, 4, "itself"),
        (TASK, 1, 4, "srun"),
        (TASK | {"SLURM_JOB_NAME": "bash"}, 1, 4, "srun"),  # a run's folder of that name
        (TASK | {"SLURM_PROCID": "3"}, 2, 2, "srun"),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", **JOB}, 2, 2, "torchrun"),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "4"}, 1, 4, "itself"),  # a helper
        ({"KUBERNETES_PORT": "1", "RANK": "7", "WORLD_SIZE": "8"}, 1, 4, "another"),
    ],
)
def test_whoever_started_a_process_is_known(environment, nodes, devices, by):
    assert starter(environment, nodes, devices) == by


LEFT_OVER = {
    "a notebook in a job": (
        JOB | {"SLURM_JOB_NAME": "jupyter"},
        "start it with srun --nodes=1 --ntasks-per-node=4, or have 4 processes start here",
    ),
    "a batch script without srun": (BATCH, "srun has not started this process"),
    "srun with other tasks": (TASK | {"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 tasks"),
    "srun with --ntasks": (
        {key: value for key, value in TASK.items() if key != "SLURM_NTASKS_PER_NODE"},
        "not with --ntasks",
    ),
    "torchrun with others": ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8"}, "started 8"),
    "a world of before": ({"WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"}, "unset RANK"),
    "a rank of before": ({"RANK": "5", "LOCAL_RANK": "5"}, "LOCAL_RANK: is 5"),
    "a rank of another machine": ({"RANK": "5", "LOCAL_RANK": "1"}, "RANK: is 5"),
    "half a rank": ({"RANK": "1"}, "unset RANK"),
    "no number": ({"LOCAL_RANK": "first"}, "must be a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OVER)
def test_what_is_left_over_is_told_in_one_line(name):
    environment, words = LEFT_OVER[name]
    with pytest.raises(ValueError, match=words) as told:
        starter(environment, 1, 4)
    assert "\n" not in str(told.value)


def test_one_device_needs_nobody_and_a_rank_of_before_is_still_told():
    assert starter(BATCH, 1, 1) == "itself"
    with pytest.raises(ValueError, match="LOCAL_RANK: is 3"):
        starter({"LOCAL_RANK": "3"}, 1, 1)


def test_jobs_of_the_same_last_digits_and_steps_of_a_job_meet_elsewhere():
    jobs = [{"SLURM_JOB_ID": str(number)} for number in (11234, 21234, 31234, 11235, 1234)]
    steps = [{"SLURM_JOB_ID": "11234", "SLURM_STEP_ID": str(number)} for number in range(1, 6)]
    ports = [port_of(each) for each in jobs + steps]
    assert len(set(ports)) == len(ports)
    assert all(15_000 <= port < 32_000 for port in ports)
    assert port_of({"SLURM_JOB_ID": "1", "MASTER_PORT": "777"}) == 777


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", ""])
def test_what_is_no_port_is_told(port):
    with pytest.raises(ValueError, match="^MASTER_PORT: "):
        check_address({"MASTER_PORT": port}, "itself", leads=False, nodes=1)


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@pytest.mark.parametrize("by", ["itself", "srun", "torchrun"])
def test_a_port_in_use_is_told_by_the_first_rank(taken, by):
    with pytest.raises(ValueError, match=f"MASTER_PORT: .*port {taken} .*in use"):
        check_address({"MASTER_PORT": taken}, by, leads=True, nodes=2)
    check_address({"MASTER_PORT": taken}, by, leads=False, nodes=2)
    # The port of torchrun's own process, which the ranks then meet at.
    agent = {"MASTER_PORT": taken, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    check_address(agent, "torchrun", leads=True, nodes=2)


def test_the_port_that_follows_from_a_job_is_looked_at_too(monkeypatch):
    job = {"SLURM_JOB_ID": "77"}
    with socket.create_server(("", port_of(job))), pytest.raises(ValueError, match="in use"):
        check_address(job, "srun", leads=True, nodes=1)


def test_an_address_of_before_is_told():
    with pytest.raises(ValueError, match="no machine that is known here"):
        check_address({"MASTER_ADDR": "no.such.machine.invalid"}, "srun", leads=False, nodes=2)
    with pytest.raises(ValueError, match="MASTER_ADDR: 192.0.2.1 is not this machine"):
        check_address({"MASTER_ADDR": "192.0.2.1"}, "itself", leads=True, nodes=1)
    check_address({"MASTER_ADDR": "localhost"}, "itself", leads=True, nodes=1)


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "base.yaml", tmp_path / "experiments")
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_tells_it_at_once_and_claims_nothing(place, monkeypatch, capsys, taken):
    for name, value in (JOB | {"SLURM_JOB_NAME": "jupyter"}).items():
        monkeypatch.setenv(name, value)
    begun = time.monotonic()
    assert main(["train", "tried", "trainer.devices=4"]) == 2
    for name in JOB:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_PORT", taken)
    assert main(["train", "tried", "trainer.devices=2"]) == 2
    assert time.monotonic() - begun < 60  # not start_timeout's 600, on a busy machine
    told = capsys.readouterr().err.splitlines()
    assert [line[:21] for line in told] == ["error: SLURM_JOB_ID: ", "error: MASTER_PORT: t"]
    assert not (place / "runs").exists()


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_the_others_do_not_come_to_ends_in_time(place, rank, taken):
    """Rank 1 finds a server that is no rank and says nothing; rank 0 finds nobody."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = taken if rank else str(free.getsockname()[1])
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
             "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
             "TORCHELASTIC_RUN_ID": "tried", "OMP_NUM_THREADS": 1,
             "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}  # fmt: skip
    words = ["train", "tried", "trainer.devices=2", "trainer.start_timeout=6"]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_pl", *words],
        env=os.environ | {key: str(value) for key, value in given.items()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert time.monotonic() - begun < 60
    assert f"failed: 127.0.0.1:{port}: the ranks " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
@pytest.mark.parametrize("value", ["x", "", "-1", "\u0663"])
def test_a_rank_that_is_no_number_is_one_line_before_anything_is_imported(name, value):
    """Lightning reads it while it is imported."""
    from diffusion_pl.commands.safety import refuse_unsafe

    with pytest.raises(ValueError, match=f"^{name}: must be a whole number"):
        refuse_unsafe({name: value})
    refuse_unsafe({name: "3"})
