"""`--sbatch`: what contradicts the job is one line before anything is written."""

from __future__ import annotations

import pytest
from homes import experiments
from test_cli import TINY

from diffusion_pl.cli import main
from diffusion_pl.commands.sbatch_options import check_options

OWN = {"--nodes": "2", "--ntasks-per-node": "4", "--ntasks": "8", "--cpus-per-task": "3",
       "--time": "24:00:00", "--gpus-per-node": "4", "--gpus": "8"}  # fmt: skip


@pytest.mark.parametrize(
    "option",
    [
        "--partition=gpu", "-pgpu", "-A me", "--mem=64G", "--exclusive", "--qos=high", "-C a100",
        "--mail-type=END", "--nodes=2", "-N2", "--gpus-per-node=a100:4", "--gres=gpu:a100:4",
        "--gres=shard:2", "--ntasks=8", "--cpus-per-task=3", "-t 24:00:00", "--requeue",
        "--open-mode=append", "--output=logs/%j", "--job-name=mine",
    ],
)  # fmt: skip
def test_what_agrees_with_the_job_is_passed_on(option):
    check_options([option], OWN, 1)


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--nodes=3", "use --nodes"), ("-N 3", "use --nodes"), ("--nodes=2-4", "use --nodes"),
        ("--ntasks=4", "or --tasks"), ("-n4", "or --tasks"), ("--tasks-per-node=1", "or --tasks"),
        ("--ntasks-per-node=8", "or --tasks"), ("--cpus-per-task=16", "use --cpus"),
        ("-c16", "use --cpus"), ("--gpus-per-node=8", "use --gpus"), ("-G4", "use --gpus"),
        ("--gres=gpu:a100:8", "use --gpus"), ("--gres=gpu", "use --gpus"),
        ("--gpus-per-task=1", "use --gpus"), ("--time=1", "use --time"), ("-t10", "use --time"),
        ("--signal=B:TERM@60", "use --margin"), ("--array=0-3", "use --sweep"),
        ("--no-requeue", "leave it out"), ("--open-mode=truncate", "leave it out"),
        ("--wrap=true", "leave it out"),
    ],
)  # fmt: skip
def test_what_contradicts_the_job_is_told_with_what_to_say(option, instead):
    with pytest.raises(ValueError, match=f"^--sbatch: '{option}' contradicts .*{instead}") as told:
        check_options([option], OWN, 1)
    assert "\n" not in str(told.value)


def test_an_array_may_say_how_many_run_at_a_time():
    check_options(["--array=0-3%2"], OWN, 4)
    for other in ("--array=0-7%2", "--array=0-3", "-a1-3"):
        with pytest.raises(ValueError, match="use --sweep"):
            check_options([other], OWN, 4 if other != "--array=0-3" else 1)


def test_two_of_one_and_what_is_no_option_are_told():
    with pytest.raises(ValueError, match=r"--partition is given twice \(a and b\); give one"):
        check_options(["--partition=a", "-p b"], OWN, 1)
    check_options(["--partition=a", "-p a"], OWN, 1)
    with pytest.raises(ValueError, match="'partition=a' is no option of sbatch"):
        check_options(["partition=a"], OWN, 1)


@pytest.fixture
def place(tmp_path, monkeypatch):
    experiments(tmp_path, TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_launch_writes_nothing_then(place, capsys):
    words = ["launch", "tiny", "--tasks", "2", "--dry-run"]
    for option in ("--cpus-per-task=16", "--nodes=2"):
        assert main([*words, f"--sbatch={option}"]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: --sbatch: '{option}' contradicts")
        assert told.count("\n") == 1
    assert not (place / "runs").exists()
    assert main([*words, "--sbatch=--cpus-per-task=1", "--sbatch=--mem=8G"]) == 0


def test_what_the_submitter_has_set_does_not_overrule_the_script(place, monkeypatch):
    (place / "bin").mkdir()
    sbatch = place / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\nenv > sbatch.env\necho 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place / 'bin'}:/bin:/usr/bin")
    for name in ("SBATCH_TIMELIMIT", "SBATCH_NO_REQUEUE", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "1")
    assert main(["launch", "tiny", "--tasks", "1"]) == 0
    given = (place / "sbatch.env").read_text()
    assert "SBATCH_ACCOUNT=1" in given
    assert "SBATCH_TIMELIMIT" not in given and "SBATCH_NO_REQUEUE" not in given
