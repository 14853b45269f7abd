"""Side-by-side timing and recorded results."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "diffusers")


def interleaved(
    cases: Mapping[str, Callable[[], object]], repetitions: int = 5, warm_ups: int = 1
) -> dict[str, list[float]]:
    """Seconds of every case, the cases taking turns so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warm_ups + repetitions):
        for name, run in cases.items():
            started = time.perf_counter()
            run()
            if turn >= warm_ups:
                times[name].append(time.perf_counter() - started)
    return times


def command(*words: str, threads: int = 1) -> tuple[str, float, float]:
    """Run the command line of the package: its output, its wall and its CPU seconds.

    Args:
        words: of the command line.
        threads: of each process.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "diffusion_pl", *words], cwd=RESULTS.parents[1],
            env={**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            errors.seek(0)
            raise SystemExit(f"{' '.join(words)} failed: {errors.read().decode()[-2000:]}")
    return said, time.monotonic() - started, usage.ru_utime + usage.ru_stime


# Imported once, in the process that those of forked_command are forked from.
PRELOADED = (
    "lightning", "torch._dynamo", "scipy.stats", "torchmetrics", "diffusion_pl.commands.train",
    "diffusion_pl.commands.evaluate",
)  # fmt: skip


def forked_command(*words: str, core: int | None = None) -> tuple[str, float, float]:
    """As `command`, in a process of one thread that has imported the libraries already.

    For many short runs, of which the imports would be a third.

    Args:
        words: of the command line.
        core: on which it runs; None: on any.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_call, args=(words, Path(folder), core))
        process.start()
        process.join()
        if process.exitcode:
            errors = (Path(folder) / "stderr").read_text()
            raise SystemExit(f"{' '.join(words)} failed: {errors[-2000:]}")
        said = (Path(folder) / "stdout").read_text()
        seconds = float((Path(folder) / "seconds").read_text())
    return said, time.monotonic() - started, seconds


def _call(words: tuple[str, ...], folder: Path, core: int | None) -> None:
    """Run the command line in this process: what it says and its CPU seconds go to a folder."""
    from diffusion_pl.cli import main

    if core is not None:
        os.sched_setaffinity(0, {core})
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    before = _used()
    code = main(words)
    sys.stdout.flush()
    (folder / "seconds").write_text(str(_used() - before))
    raise SystemExit(code)


def _used() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    of = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in of)


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except OSError:
        pass
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def record(name: str, figures: Any) -> Path:
    """Write a result with its hardware and date; print it."""
    machine = hardware()
    label = (machine["gpu"] or f"{machine['processor']} {machine['instructions']}").lower()
    path = RESULTS / f"{name}-{label.replace(' ', '-')}.json"
    result = {"date": time.strftime("%Y-%m-%d"), "hardware": machine, "figures": figures}
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    print(f"recorded in {path.relative_to(RESULTS.parents[1])}")
    return path
