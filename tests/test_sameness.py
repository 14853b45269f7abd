"""Ranks that would train different runs: each difference is named, on every rank, before a step."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys

import alike
import pytest
from test_cli import ROOT
from test_run_folder import RUN, photograph


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    first, *others = alike.found(tmp_path_factory.mktemp("ranks"))
    assert all(each == first for each in others)  # all of them end, and say the same
    return first


def test_ranks_that_are_alike_go_on_wherever_their_data_lies(answers):
    assert answers["alike"] == answers["shared"] == answers["unlocked"] == ""
    assert answers["first"] == "zero"


@pytest.mark.parametrize(
    ("what", "rank", "told"),
    [
        ("config", 2, "optimizer.lr is 0.01 there and 0.001 on rank 0"),
        ("data", 1, "training_data.count is 20 there and 40 on rank 0"),
        ("checkpoint", 1, 'start.checkpoint is 8 cd there and "16 ab" on rank 0'),
        ("absent", 1, "trainer.clip is absent there and 1 on rank 0"),
        ("much", 1, "network.2 is 1 there and 0 on rank 0; and 2 more; start all ranks by one"),
    ],
)
def test_a_rank_that_differs_is_named_with_the_difference(what, rank, told, answers):
    host = socket.gethostname()
    assert answers[what].startswith(f"rank {rank} on {host} would train another run than rank 0")
    assert told in answers[what] and "\n" not in answers[what]


def test_folders_that_are_not_shared_are_noticed(answers):
    assert "own: rank 2 on " in answers["own"] and "does not see what rank 0 on" in answers["own"]
    assert answers["own"].endswith("name a folder that all of them share with --run")


def test_other_pixels_on_one_rank_end_both_before_a_step(tmp_path):
    """Two processes as torchrun starts them, each with a copy of the data of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        node = tmp_path / f"node{rank}"
        shutil.copytree(ROOT / "experiments", node / "experiments")
        (node / "experiments" / "tiny.yaml").write_text(RUN)
        for number in range(12):
            photograph(node / "photographs" / f"{number:02}.png", 20 * number + 5 * rank)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
                 "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                 "TORCHELASTIC_RUN_ID": "tried"}  # fmt: skip
        words = ["train", "tiny", "trainer.devices=2", "--run", str(tmp_path / "run")]
        process = subprocess.Popen(
            [sys.executable, "-m", "diffusion_pl", *words],
            cwd=node,
            env=os.environ | {key: str(value) for key, value in names.items()},
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    ends = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], ends
    for said in ends:
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "rank 1 on " in line and "training_data.fingerprints.8 is " in line
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
