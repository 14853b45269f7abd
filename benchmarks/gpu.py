"""What waits for a GPU, in one command of at most nine minutes on one H200.

Parts run in the order of their worth, each in a process of its own with a time limit, so that one
that fails or hangs costs its own time alone; the record is written as each of them ends.

    make bench BENCH=gpu
    .venv/bin/python -m benchmarks.gpu --only training --minutes 3
    .venv/bin/python -m benchmarks.gpu --device cpu --small --out FILE    # every line, in a minute

    environment    versions, the device, its measured peak in bf16 and fp32, its memory's speed
    correctness    every network in fp32 and bf16 beside the CPU's fp32; compiled by block
    resume         a run that goes on, to the bit: bf16 deterministic, fp16 with its loss scale
    syncs          what a training step waits for on the host
    training       DDPM++ (55.7 M): images/s, share of the measured peak, by batch and compilation
    sampling       DDPM++, 18 steps of Heun: images/s
    transformers   JiT-B/16 at 256 px and the U-ViT: images/s, memory; checkpointing, routing
    inception      features: images/s
    race           CIFAR-10 (or part of it), minutes of ours and of a plain loop, and their distance
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import PARTS, Scale
from benchmarks.measure import RESULTS, hardware

MINUTES = 9.0
LEAST = 5.0  # seconds that a part must have left to begin


def run_part(name: str, seconds: float, scale: Scale) -> dict[str, Any]:
    """A part in a process of its own: its figures, or why there are none."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        words = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--out", str(out)]
        words += ["--device", scale.device, "--seconds", f"{seconds:.1f}"]
        words += ["--small"] if scale.small else []
        with (Path(folder) / "said").open("w+") as said:
            try:
                done = subprocess.run(
                    words, cwd=RESULTS.parents[1], stdout=said, stderr=said, timeout=seconds,
                    check=False,
                )  # fmt: skip
                problem = None if done.returncode == 0 else f"ended with {done.returncode}"
            except subprocess.TimeoutExpired:
                problem = f"stopped after {seconds:.0f} s"
            said.seek(0)
            last = said.read()[-1500:]
        # What a part had found when it was stopped counts.
        figures = json.loads(out.read_text()) if out.exists() else {}
    taken = {"seconds": round(time.monotonic() - started, 1)}
    return {**figures, **taken} | ({"problem": problem, "said": last} if problem else {})


def main() -> int:
    """Run the parts, or one of them."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda")
    options.add_argument("--small", action="store_true", help="tiny networks, a step or two")
    options.add_argument("--only", nargs="+", choices=list(PARTS))
    options.add_argument("--minutes", type=float, default=MINUTES)
    options.add_argument("--out", type=Path)
    options.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    scale = Scale(chosen.device, chosen.small, chosen.seconds, chosen.out)
    if chosen.part:
        scale.write(PARTS[chosen.part][0](scale))
        return 0
    machine = hardware()
    label = (machine["gpu"] or machine["processor"]).lower().replace(" ", "-")
    out = chosen.out or RESULTS / f"gpu-{label}.json"
    ends = time.monotonic() + 60 * chosen.minutes
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "hardware": machine, "figures": {}}
    for name, (_, limit) in PARTS.items():
        left = ends - time.monotonic()
        if chosen.only and name not in chosen.only:
            continue
        figures = (
            run_part(name, min(limit, left), scale)
            if left > LEAST
            else {"problem": "no time was left"}
        )
        found["figures"][name] = figures
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {json.dumps(figures)[:300]}", flush=True)
    return int(any("problem" in each for each in found["figures"].values()))


if __name__ == "__main__":
    sys.exit(main())
