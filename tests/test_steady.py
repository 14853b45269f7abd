"""Twelve hundred steps with thirty evaluations: memory, open files and threads stay as they are."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cli import ROOT, TINY

from diffusion_pl.networks.song_unet import SongUNet

pytestmark = pytest.mark.faults

STEPS, EVERY = 1200, 40  # steps in all, and between two evaluations


class Watched(SongUNet):
    """Writes what its process holds, now and then, to a file that the environment names."""

    calls = 0

    def forward(self, x, c_noise, **condition):
        Watched.calls += 1
        if Watched.calls % 100 == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what is freed but not given back is no leak
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            held = {
                "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
                "files": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
            }
            with open(os.environ["HELD"], "a") as file:
                file.write(json.dumps(held) + "\n")
        return super().forward(x, c_noise, **condition)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts in /proc")
def test_a_long_run_holds_no_more_at_its_end_than_at_its_beginning(tmp_path):
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "base.yaml", tmp_path / "experiments")
    text = TINY.replace("diffusion_pl.networks.song_unet.SongUNet", "test_steady.Watched")
    text = text.replace("  batch_size: 8\n", "  batch_size: 2\n")
    text = text.replace("every: 16, count: 20", f"every: {2 * EVERY}, count: 10")
    text = text.replace("images: 32, checkpoint_every: 8, log_every: 8",
                        f"images: {2 * STEPS}, checkpoint_every: 400, log_every: 20")  # fmt: skip
    (tmp_path / "experiments" / "tiny.yaml").write_text(text)
    environment = {
        **os.environ,
        "HELD": str(tmp_path / "held"),
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",  # glibc; an arena a thread adds up to a megabyte by chance
    }
    command = [sys.executable, "-m", "diffusion_pl", "train", "tiny"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "held").read_text().splitlines()]
    assert len(rows) >= (STEPS + STEPS // EVERY * 5) // 100
    # The first quarter fills caches of all kinds.
    settled = rows[len(rows) // 4 :]
    for held in ("files", "threads"):
        counts = [row[held] for row in settled]
        assert max(counts[len(counts) // 2 :]) <= max(counts[: len(counts) // 2]), (held, counts)
    # Medians, as an evaluation's own memory comes and goes. A step that kept its batch of two
    # images would hold 6 kB more.
    third = len(settled) // 3
    held = [row["bytes"] for row in settled]
    slope = (np.median(held[-third:]) - np.median(held[:third])) / (STEPS / 2)
    assert slope < 2000, (slope, held)
