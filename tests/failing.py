"""Runs of which one call that reads or changes a file of the run's folder fails or is the last.

`failing.c` stands between the process and the C library. The process here has everything imported
and forks itself for each run, which then takes a fraction of a second.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from homes import SMALLEST

HERE = Path(__file__).parent
LIMIT = 120  # seconds of a run before it hangs

# By name: the error of the call, what becomes of it and later ones (failing.c), whether of reads.
WAYS = {
    "the disk is full": (errno.ENOSPC, 1, 0),
    "the disk is full within a write": (errno.ENOSPC, 3, 0),
    "an error of the disk, once": (errno.EIO, 0, 0),
    "not permitted": (errno.EACCES, 1, 0),
    "killed": (0, 2, 0),
    "a read fails, once": (errno.EIO, 0, 1),
}

# Every kind of file that a run writes, in as few steps as that takes.
RUN = (
    "# Tried at every file (no published number)\n"
    + SMALLEST
    + """\
data:
  dataset: {_target_: diffusion_pl.data.synthetic.Synthetic, count: 16, resolution: 8}
  batch_size: 8
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20, posthoc_every: 16}
sampler: {steps: 1}
features: {name: shapes}
evaluation: {every: 16, count: 12, batch_size: 12, grid: 1}
trainer:
  {total_images: 32, checkpoint_every: 16, log_every: 16, keep: 1, accelerator: cpu,
   precision: fp32}
"""
)


@dataclass
class Outcome:
    """What came of a run with a fault, and of the same command after it.

    Args:
        way: of `WAYS`.
        number: of the call.
        where: the call and its file.
        code: exit code; negative: the signal; None: it hung.
        said: the lines on stderr.
        broken: files that are not whole after the fault.
        again: exit code of the same command without a fault.
        said_again: its last lines on stderr.
        left: temporary files that are left then.
        state: what the run has come to then, see `state`.
    """

    way: str
    number: int
    where: str
    code: int | None
    said: list[str]
    broken: list[str]
    again: int | None
    said_again: list[str]
    left: list[str]
    state: list


def compiled(folder: Path) -> Path | None:
    """The library to load before the others; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "failing.so"
    words = [compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "failing.c", "-ldl"]
    subprocess.run(words, check=True)
    return library


def outcomes(library: Path, folder: Path, ways, sample: int | None = None, words=()):
    """The undisturbed run's state, and what came of each disturbed one.

    Args:
        library: `compiled`.
        folder: has experiments/.
        ways: of `WAYS`.
        sample: every so manieth of the places; None: all.
        words: overrides of the run.
    """
    (folder / "experiments" / "failing.yaml").write_text(RUN)
    done = subprocess.run(
        [sys.executable, HERE / "failing.py", library, json.dumps(ways), str(sample or 1), *words],
        cwd=folder,
        env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return lines[0], [Outcome(**line) for line in lines[1:]]


def main(library, ways, sample, *words):
    """Try every way at every call, in the folder where this is started; a line of JSON each."""
    # A thread or a warning of these would come into every child.
    import torch

    import diffusion_pl.commands.train
    import diffusion_pl.training.run  # noqa: F401

    torch.set_num_threads(1)
    lib = ctypes.CDLL(library)
    lib.failing_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, *[ctypes.c_int] * 4]
    lib.failing_first.restype = ctypes.c_char_p
    tell = os.fdopen(os.dup(1), "w")
    chosen = {}
    for reads in (0, 1):
        code, said, _ = train(lib, "straight", words, (0, 0, reads), 0)
        assert code == 0, said
        chosen[reads] = places(Path("calls").read_text().splitlines())
        kept = state(Path("runs/straight"))
        shutil.rmtree("runs/straight")
    print(json.dumps(kept), file=tell, flush=True)
    for way in json.loads(ways):
        for number in chosen[WAYS[way][2]][:: int(sample)]:
            code, said, where = train(lib, "run", words, WAYS[way], number)
            run = Path("runs/run")
            damaged = broken(run)
            again, said_again, _ = train(lib, "run", words, (0, 0, 0), 0)
            left = [str(p) for end in ("tmp", "part", "damaged") for p in run.rglob(f"*.{end}")]
            found = Outcome(
                way, number, where, code, said, damaged, again, said_again[-3:], left, state(run)
            )
            print(json.dumps(asdict(found)), file=tell, flush=True)
            shutil.rmtree(run, ignore_errors=True)


def train(lib, name, words, way, number):
    """Train in a fork: its exit code, its lines on stderr, the call that failed first.

    Args:
        lib: `failing.c`.
        name: of the run.
        words: overrides.
        way: error, mode, whether of reads.
        number: of the call that fails; 0 for none.
    """
    ours, theirs = os.pipe()
    process = os.fork()
    if process == 0:
        _train(lib, name, words, way, number, theirs)
    os.close(theirs)
    until = time.monotonic() + LIMIT
    ended, status = os.waitpid(process, os.WNOHANG)
    while not ended and time.monotonic() < until:
        time.sleep(0.005)
        ended, status = os.waitpid(process, os.WNOHANG)
    if not ended:
        os.kill(process, 9)
        os.waitpid(process, 0)
    with os.fdopen(ours) as pipe:
        where = pipe.read()
    said = Path("said").read_text(errors="replace").splitlines()
    where = where or next((line[7:] for line in said if line.startswith("KILLED ")), "")
    code = os.waitstatus_to_exitcode(status) if ended else None
    return code, [line for line in said if line], where


def places(calls):
    """The numbers of the calls to try, from 1: of one and the same in a row the ends alone."""
    names = [re.sub(r"\.[0-9]+\.tmp", ".tmp", call) for call in calls]
    around = zip(names, ["", *names[:-1]], [*names[1:], ""], strict=True)
    return [n for n, (name, one, other) in enumerate(around, 1) if not name == one == other]


def _train(lib, name, words, way, number, tell):
    from diffusion_pl.cli import main as command

    out = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), line_buffering=True)
        for number in (1, 2)
    )
    code = 99
    calls = os.open("calls", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    lib.failing_arm(os.path.abspath(f"runs/{name}").encode(), number, *way, calls)
    try:
        code = command(["train", "failing", "--run", f"runs/{name}", *words])
    except BaseException:
        traceback.print_exc()
        code = 1
    lib.failing_disarm()
    os.write(tell, lib.failing_first())
    os._exit(code)


def broken(run: Path):
    """The checkpoints, grids and snapshots of a run that are not whole."""
    from PIL import Image
    from safetensors import safe_open

    from diffusion_pl.training import checkpoint as checkpoints

    def whole(path):
        if path.suffix == ".ckpt":
            checkpoints.verify(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        else:
            with safe_open(path, framework="pt") as file:
                file.keys()

    found = []
    for end in ("ckpt", "png", "safetensors"):
        for path in run.rglob(f"*.{end}"):
            try:
                whole(path)
            except Exception as error:
                found.append(f"{path}: {error}")
    return found


def state(run: Path):
    """All that a run has come to that is the same each time: digests, rows, names."""
    import hashlib

    import torch

    from diffusion_pl.training import checkpoint as checkpoints

    try:
        loaded = checkpoints.load(checkpoints.latest(run / "checkpoints"))
        digest = hashlib.sha256()

        def take(value):
            if isinstance(value, torch.Tensor):
                digest.update(value.numpy().tobytes())
            elif isinstance(value, dict):
                for key, each in value.items():
                    digest.update(str(key).encode())
                    take(each)
            elif isinstance(value, list | tuple):
                for each in value:
                    take(each)
            else:
                digest.update(repr(value).encode())

        take([loaded["state_dict"], loaded["optimizer_states"]])
        timed = ("seconds", "images_per_second", "time", "commit", "data_wait", "memory_gb")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
        rows = [{key: row[key] for key in row if key not in timed} for row in rows]
        for path in sorted((run / "posthoc").iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
        names = [
            path.name for kind in ("samples", "checkpoints") for path in (run / kind).iterdir()
        ]
        kept = hashlib.sha256(repr(rows).encode()).hexdigest()
        return [digest.hexdigest(), kept, len(rows), sorted(names), (run / "REQUEUE").exists()]
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]


if __name__ == "__main__":
    main(*sys.argv[1:])
