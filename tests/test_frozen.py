"""Runs of earlier builds, half trained, go on to the end that those builds came to.

They lie in data/frozen/, with what was expected of them then; see make.py there. A run goes on
under its own YAML, in the words of its time. On the machine that froze it every bit is the same; on
another, sums of float32 are rounded otherwise.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from pathlib import Path

import homes
import numpy as np
import pytest
import torch

from diffusion_pl.training import checkpoint as checkpoints

FROZEN = Path(__file__).parent / "data/frozen"
sys.path.insert(0, str(FROZEN))
import make  # noqa: E402

with tarfile.open(FROZEN / "runs.tar.xz") as _archive:
    RUNS = sorted({name.rpartition("/")[0] for name in _archive.getnames() if "expected" in name})

# Two steps of Adam at 1e-3 with eps 1e-3. A gradient g rounded to within 1e-5 |g|, some hundred
# roundings of 6e-8, moves a weight by less than 1e-3 * 1e-5 a step; a projection adds some hundred.
WEIGHTS = 1e-6
LEVELS = 1  # of 255: what lies between two levels may be rounded to either
ROWS = 0.01  # relative: a level in each pixel moves a distance of 4 images by less


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    with tarfile.open(FROZEN / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def laid_out(frozen_run, folder, monkeypatch):
    """A frozen run in a folder of commands, beside the experiments of its time."""
    monkeypatch.chdir(folder)
    run = Path("runs") / frozen_run.name
    shutil.copytree(frozen_run, run)
    shutil.copytree(FROZEN / "experiments", "experiments")
    shutil.copy(homes.ROOT / "experiments/base.yaml", "experiments")
    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_an_earlier_build_goes_on_to_the_same_end(name, frozen, tmp_path, monkeypatch):
    run = laid_out(frozen / name, tmp_path, monkeypatch)
    expected = json.loads((run / "expected.json").read_text())
    same = expected["machine"] == make.machine()

    def close(rows):
        return pytest.approx(rows, rel=0 if same else ROWS, abs=0)

    assert make.measured(run) == close(expected["measured"])
    drawn = make.sampled(run, Path("drawn")).astype(int) - np.array(expected["pixels"])
    assert abs(drawn).max() <= (0 if same else LEVELS)

    make.command("train", run.name)
    end = make.weights(run / "checkpoints" / f"{make.END:012d}.ckpt")
    assert make.rows(run) == close(expected["rows"])
    assert make.projections(end) == pytest.approx(expected["projections"], rel=1e-5, abs=WEIGHTS)
    assert not same or make.digest(end) == expected["digest"]


def test_a_run_stopped_once_more_comes_to_the_same_bits(frozen, tmp_path, monkeypatch):
    run = laid_out(frozen / "f7b48b9/pyramid", tmp_path, monkeypatch)
    ends = []
    for _ in range(2):
        make.command("train", run.name)
        end = run / "checkpoints" / f"{make.END:012d}.ckpt"
        ends.append(make.digest(make.weights(end)))
        end.unlink()
        between = run / "checkpoints" / f"{(make.HALF + make.END) // 2:012d}.ckpt"
        checkpoints.point_to(between)
    assert ends[0] == ends[1]
