"""Ranks that would train different runs: each difference is named, on every rank, before a step."""

from __future__ import annotations

import socket

import alike
import pytest
import started
from homes import experiments
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
        ("absent", 1, "trainer.grad_clip is absent there and 1 on rank 0"),
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
    nodes = [tmp_path / f"node{rank}" for rank in range(2)]
    for rank, node in enumerate(nodes):
        node.mkdir()
        experiments(node, RUN)
        for number in range(12):
            photograph(node / "photographs" / f"{number:02}.png", 20 * number + 5 * rank)
    words = ["train", "tiny", "trainer.devices=2", "--run", tmp_path / "run"]
    processes = started.begin(nodes, words, log=tmp_path / "log")
    assert [started.ended(process) for process in processes] == [2, 2]
    ends = [line for line in (tmp_path / "log").read_text().splitlines() if "error: " in line]
    assert len(ends) == 2
    for line in ends:
        assert (
            line.startswith("error: ")
            and "rank 1 on " in line
            and "training_data.fingerprints.8 is " in line
        )
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
