"""Side-by-side timing and recorded results."""

from __future__ import annotations

import json
import os
import platform
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


def command(*words: str) -> tuple[str, float, float]:
    """Run the command line of the package: its output, its wall and its CPU seconds.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "diffusion_pl", *words], cwd=RESULTS.parents[1],
            env={**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            errors.seek(0)
            raise SystemExit(f"{' '.join(words)} failed: {errors.read().decode()[-2000:]}")
    return said, time.monotonic() - started, usage.ru_utime + usage.ru_stime


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
