"""Freeze tiny runs of every family as the present build trains them: half trained, and their end.

    cd tests/data/frozen && PYTHONPATH=BUILD python make.py NAME BASE FAMILY ...

A later build is held against them by tests/test_frozen.py: it has to open a run, go on with it to
the same end and measure the same. NAME is the build's, BASE its experiments/base.yaml. What is
added to runs.tar.xz stays as it was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import platform
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch

HALF, END = 8, 16  # images seen
COUNT = 4  # images measured
DRAWN = 2  # images sampled
HERE = Path(__file__).parent
ARCHIVE = HERE / "runs.tar.xz"
EXPERIMENTS = HERE / "experiments"


def command(*words):
    """What a command of the present build prints."""
    from diffusion_pl.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    assert code == 0, f"{words}: {code}: {err.getvalue()}"
    return out.getvalue()


def measured(run):
    """The evaluation of a run's newest checkpoint, name to value, with features of pixels."""
    words = ("--count", COUNT, "--batch-size", COUNT, "--features", "pixels")
    rows = json.loads(command("evaluate", run, *words, "--metrics", "frechet"))["measures"]
    return {row["name"]: row["value"] for row in rows}


def sampled(run, out):
    """Pixels of a few images of a run, row by row: uint8 (N,)."""
    command("sample", run, "--count", DRAWN, "--out", out)
    return np.load(out / "images.npz")["images"].reshape(-1)


def weights(file):
    """The raw and averaged weights in a checkpoint, name to tensor."""
    state = torch.load(file, weights_only=True)["state_dict"]
    return {key: value for key, value in state.items() if key.startswith(("denoiser.", "ema."))}


def digest(state):
    """sha256 (hex) of weights, whatever their names' order."""
    whole = hashlib.sha256()
    for key in sorted(state):
        whole.update(state[key].contiguous().numpy().tobytes())
    return whole.hexdigest()


def projections(state):
    """A number a tensor in which every weight has a part, of the size of their norm."""
    return {key: _projection(value.double().flatten()) for key, value in sorted(state.items())}


def _projection(values):
    return float(values @ torch.cos(torch.arange(len(values), dtype=torch.float64)))


def rows(run):
    """The last evaluation of a run's training, name to value."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["name"]: row["value"] for row in lines if "name" in row and row["images"] == END}


def machine():
    """Where sums of floats come out alike, to the last bit."""
    said = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    kinds = sorted({line for line in said.splitlines() if line.startswith(("model", "flags"))})
    cpu = hashlib.sha256("\n".join(kinds).encode()).hexdigest()[:12]
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {cpu} {kernels} torch {torch.__version__}"


def halve(run):
    """Take away what came after the first half."""
    kept = run / "checkpoints" / f"{HALF:012d}.ckpt"
    for file in (*run.rglob("*.ckpt"), *run.rglob("*.safetensors"), *run.rglob("*.pt")):
        if file.stem.isdecimal() and int(file.stem) != HALF:
            file.unlink()
    (run / "checkpoints/latest").write_text(kept.name)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept_rows = [line for line in lines if json.loads(line)["images"] <= HALF]
    (run / "metrics.jsonl").write_text("".join(kept_rows))
    shutil.rmtree(run / "samples")


def freeze(name, place):
    """Train a family, and say what its second half is to come to."""
    command("train", name)
    run = Path("runs") / name
    end = weights(run / "checkpoints" / f"{END:012d}.ckpt")
    expected = {
        "machine": machine(),
        "digest": digest(end),
        "projections": projections(end),
        "rows": rows(run),
    }
    halve(run)
    kept = place / name
    shutil.copytree(run, kept)
    expected |= {"measured": measured(run), "pixels": sampled(run, Path("drawn") / name).tolist()}
    assert all(map(math.isfinite, [*expected["rows"].values(), *expected["measured"].values()]))
    (kept / "expected.json").write_text(json.dumps(expected))


def main():
    build, base = sys.argv[1], Path(sys.argv[2]).resolve()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if ARCHIVE.exists():
            with tarfile.open(ARCHIVE) as archive:
                archive.extractall("frozen", filter="data")
        shutil.copytree(EXPERIMENTS, "experiments")
        shutil.copy(base, "experiments/base.yaml")
        for name in sys.argv[3:]:
            freeze(name, Path("frozen") / build)
        with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
            for file in sorted(path for path in Path("frozen").rglob("*") if path.is_file()):
                archive.add(file, file.relative_to("frozen").as_posix())


if __name__ == "__main__":
    main()
