"""Every line of the GPU benchmark, shrunken, on the CPU; and what bounds its parts."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import PARTS, Scale

CPU = Scale("cpu", small=True)


@pytest.fixture(scope="module", autouse=True)
def torch_as_it_was():
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


QUICK = [name for name in PARTS if name not in ("correctness", "syncs", "race")]


@pytest.mark.parametrize("name", QUICK)
def test_a_part_runs_and_finds_figures(name, monkeypatch, tmp_path):
    figures = PARTS[name][0](Scale("cpu", small=True, out=tmp_path / "out.json"))
    assert figures
    json.dumps(figures)
    rates = [value for key, value in _flat(figures) if "/s" in key]
    assert all(rate > 0 for rate in rates)


def _flat(figures, name=""):
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name}{key}, ")
        else:
            yield f"{name}{key}", value


def test_networks_are_as_exact_as_their_precision():
    figures = gpu_parts.correctness(CPU)
    assert set(figures) == set(gpu_parts.NETWORKS)
    for name, found in figures.items():
        assert found["fp32"] < 1e-5, name
        assert 1e-5 < found["bf16"] < 0.1, name
    assert figures["JiT"]["fp32, compiled"] < 1e-5


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits_and_no_step_waits_for_a_gpu_where_there_is_none():
    assert gpu_parts.resume(CPU) == {"fp32, the same bits": True}
    waits = gpu_parts.syncs(CPU)
    assert waits["cudaStreamSynchronize, a step"] == 0


@pytest.mark.slow
def test_the_race_trains_both_and_measures_them():
    figures = gpu_parts.race(CPU)
    for name in ("ours", "plain loop"):
        assert figures[name]["images"] > 0
        assert {key.partition("@")[0] for key in figures[name] if "@" in key} == {"fd"}
        assert len(figures[name]) == 4


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_costs_its_own_time_alone(tmp_path, monkeypatch):
    out = tmp_path / "record.json"
    words = ["gpu", "--small", "--out", str(out), "--only", "environment", "inception"]
    # No such device: the first part fails, and the next is still begun.
    monkeypatch.setattr(sys, "argv", [*words, "--device", "nowhere"])
    assert gpu.main() == 1
    figures = json.loads(out.read_text())["figures"]
    assert list(figures) == ["environment", "inception"]
    assert all("ended with 1" in each["problem"] and each["said"] for each in figures.values())
    found = gpu.run_part("race", 3.0, CPU)  # its libraries alone take as long
    assert found["problem"] == "stopped after 3 s" and found["seconds"] < 10


def test_no_part_begins_without_time(tmp_path, monkeypatch):
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--small", "--out", str(out),
                                      "--minutes", "0.05"])  # fmt: skip
    assert gpu.main() == 1
    figures = json.loads(out.read_text())["figures"]
    assert [each["problem"] for each in figures.values()] == ["no time was left"] * len(PARTS)


def test_the_limits_leave_the_race_its_time():
    """All others at their limit would leave less; what they take on a GPU is far below it."""
    *others, (name, (_, race)) = PARTS.items()
    assert name == "race" and race <= 60 * gpu.MINUTES
    assert sum(limit for _, (_, limit) in others) <= 60 * gpu.MINUTES
