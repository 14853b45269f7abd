"""What the job's script decides, in bash, with stand-ins for SLURM's commands and for Python.

What SLURM itself does with it is in tests/slurm/.
"""

from __future__ import annotations

import os
import subprocess

import pytest

from diffusion_pl.commands import sbatch
from diffusion_pl.commands.sbatch import Job, Task

ONE = (Task("runs/a", ("tiny",)),)

# `eval` runs what a test wants to happen in the place of the check and of the training.
PYTHON = """#!/bin/bash
printf '%s\\n' "$3" "${@:4}" >> log
[ "$3" = launch ] && eval "$CHECK"
[ "$3" = train ] && eval "$TRAIN"
exit 0
"""
SRUN = """#!/bin/bash
echo "srun $1 $2" >> log
exec "${@:3}"
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && { echo first; echo second; exit 0; }
echo "scontrol $*" >> log
exit "${REFUSED:-0}"
"""


@pytest.fixture
def job(tmp_path):
    """Start the script as SLURM does, and give its code, its log and what it says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("python", PYTHON), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "runs" / "a").mkdir(parents=True)

    def call(tasks=ONE, **variables):
        job = Job(
            folder=tmp_path / "runs",
            tasks=tasks,
            nodes=2,
            ranks=1,
            on_gpu=False,
            cpus=3,
            time="10",
            margin=60,
            command="launch",
            place=tmp_path,
            python=["bin/python"],
        )
        sbatch.write(job)
        (tmp_path / "log").write_text("")
        given = {"CHECK": "", "TRAIN": "", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x[1-2]"}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        done = subprocess.run(
            ["bash", job.script],
            env=kept | given | variables | {"PATH": f"{folder}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=20,
        )
        return done.returncode, (tmp_path / "log").read_text().splitlines(), done.stderr

    call.folder = tmp_path / "runs" / "a"
    return call


REQUEUED = "scontrol requeue 7"


def test_a_finished_run_ends_the_job(job):
    code, log, said = job()
    assert (code, said) == (0, "")
    assert log == [
        *("launch", "tiny", "--run", "runs/a", "--inside"),
        "srun --kill-on-bad-exit=1 --cpus-per-task=3",
        *("train", "tiny", "--run", "runs/a"),
    ]


def test_the_ranks_meet_at_the_first_node_with_the_threads_they_may_use(job):
    assert job(TRAIN='echo "$MASTER_ADDR $OMP_NUM_THREADS" >> log')[1][-1] == "first 3"


@pytest.mark.parametrize("code", [0, 75, 143, 137])
def test_the_mark_requeues_whatever_srun_makes_of_the_code(job, code):
    assert job(TRAIN=f"touch runs/a/REQUEUE; exit {code}")[:2] == (
        0,
        [*job(TRAIN="")[1], REQUEUED],
    )


def test_a_lost_task_requeues_without_a_mark(job):
    code, log, said = job(TRAIN="exit 137")
    assert (code, log[-1]) == (0, REQUEUED)
    assert "runs/a: ended with 137 and without a mark" in said


def test_a_run_that_would_fail_again_is_left(job):
    code, log, said = job(TRAIN="echo the loss is nan > runs/a/FAILED; exit 1")
    assert code == 1
    assert REQUEUED not in log
    assert "runs/a: would fail again: the loss is nan" in said


def test_marks_of_an_earlier_start_count_for_nothing(job):
    (job.folder / "REQUEUE").touch()
    assert REQUEUED not in job()[1]
    (job.folder / "FAILED").touch()
    assert job(TRAIN="exit 137")[1][-1] == REQUEUED


def test_bad_input_ends_the_job_before_it_trains(job):
    code, log, _ = job(CHECK="exit 2")
    assert code == 2
    assert "train" not in log
    assert REQUEUED not in log


def test_a_check_that_itself_breaks_does_not_lose_the_job(job):
    assert "train" in job(CHECK="exit 1")[1]


def test_where_requeueing_is_forbidden_it_says_what_to_type(job):
    code, _, said = job(TRAIN="touch runs/a/REQUEUE; exit 75", REFUSED="1")
    assert code == 75
    assert f"to go on: sbatch {job.folder.parent / 'job.sbatch'}" in said


def test_three_restarts_without_progress_are_the_last(job):
    starts = [job(TRAIN="exit 137", SLURM_RESTART_COUNT=str(number)) for number in range(5)]
    assert ["train" in log for _, log, _ in starts] == [True, True, True, True, False]
    code, log, said = starts[-1]
    assert code == 1
    assert log == []
    assert "runs/a: 3 restarts without progress (newest checkpoint: none)" in said


def test_a_newer_checkpoint_is_progress_and_so_is_a_person(job):
    (job.folder / "checkpoints").mkdir()
    latest = job.folder / "checkpoints" / "latest"

    def trains(number):
        return "train" in job(TRAIN="exit 137", SLURM_RESTART_COUNT=str(number))[1]

    latest.write_text("000000000800.ckpt")
    assert [trains(number) for number in range(4)] == [True] * 4
    latest.write_text("000000001600.ckpt")
    assert [trains(number) for number in range(4, 9)] == [True] * 4 + [False]
    assert trains(0)  # submitted anew
    assert (job.folder / "restarts").read_text() == "000000001600.ckpt 0\n"


def test_an_array_trains_the_run_of_its_number(job):
    tasks = (Task("runs/a", ("tiny", "seed=0")), Task("runs/b", ("tiny", "seed=1")))
    code, log, _ = job(tasks, SLURM_ARRAY_TASK_ID="1")
    assert code == 0
    assert log[-4:] == ["tiny", "seed=1", "--run", "runs/b"]
    # Its own name: SLURM_JOB_ID of the last task is the array's, which means all of them.
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    assert job(tasks, TRAIN="exit 137", **array)[1][-1] == "scontrol requeue 7_1"
    code, log, said = job(tasks, SLURM_ARRAY_TASK_ID="2")
    assert (code, log) == (2, [])
    assert "no task 2" in said


def test_words_come_through_the_shell_as_they_were(job):
    odd = ("augment={_target_: 'a b', x: \"$HOME\"}", "data.dataset.path=it's [here]", "a=*")
    code, log, _ = job((Task("runs/a b", ("tiny", *odd)),))
    assert code == 0
    assert log[-6:] == ["tiny", *odd, "--run", "runs/a b"]
