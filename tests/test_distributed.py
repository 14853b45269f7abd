"""Two processes on the CPU: the same run as one process, from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from homes import experiments
from test_cli import TINY

from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History

LOSSES = "{_target_: diffusion_pl.evaluation.settings.Losses, count: 40, levels: 3}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The tiny experiment by one process, and by two that each take half of every batch."""
    place = tmp_path_factory.mktemp("distributed")
    experiments(place, TINY)
    for devices in (1, 2):
        command = [sys.executable, "-m", "diffusion_pl", "train", "tiny", "network.dropout=0.0"]
        command += [f"trainer.devices={devices}", "--run", f"runs/{devices}"]
        command += [f"evaluation.losses={LOSSES}"]
        result = subprocess.run(
            command, cwd=place, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("run      ") == 1  # one process speaks
    return place / "runs" / "1", place / "runs" / "2"


def test_two_processes_reach_the_weights_of_one(runs):
    one, two = (checkpoints.load(checkpoints.latest(run / "checkpoints")) for run in runs)
    assert one["global_step"] == two["global_step"] == 4
    for key, value in one["state_dict"].items():
        # Sums in another order, magnified by Adam in its first steps.
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-3, atol=1e-4)


def test_two_processes_measure_what_one_measures(runs):
    one, two = (
        {
            (row["images"], row["name"], row["weights"]): row["value"]
            for row in History(run / "metrics.jsonl").rows()
            if "name" in row
        }
        for run in runs
    )
    assert one.keys() == two.keys()
    assert {key[2] for key in one if key[1].startswith("loss@")} == {"ema", "denoiser"}
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=0.02), key


def test_both_leave_one_folder_with_one_of_each(runs):
    first, second = (
        sorted(str(path.relative_to(run)) for path in run.rglob("*") if "events" not in path.name)
        for run in runs
    )
    assert [path for path in first if path != "config.yaml"] == [
        path for path in second if path != "config.yaml"
    ]
    assert Path(runs[1] / "samples" / "000000000032.png").exists()
