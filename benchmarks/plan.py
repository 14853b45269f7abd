"""The memory that `plan` counts beside what a training step takes on this CPU.

Each case runs in a process of its own: the experiment is built, a step of 2 images makes the
optimizer's state and whatever libraries keep, the gradients are dropped, and then the peak of the
resident memory over one step is read from the kernel (VmHWM, begun anew). glibc gives every block
from 64 KiB on to the system and takes it back at once (MALLOC_MMAP_THRESHOLD_), since with its own
threshold, which grows, it keeps what was freed, by up to a third of the peak.

    step     the peak of one step above the process with weights, moments and averages
    in all   the same above the process before the network was built, without the 2 images' step
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks.measure import record
from diffusion_pl import config
from diffusion_pl.commands import parts
from diffusion_pl.commands.planned import Planned
from diffusion_pl.training.settings import AUTOCAST
from diffusion_pl.training.step_cost import Step
from diffusion_pl.training.step_timing import peak_resident, resident, restart_peak, step_maker

# By name: experiment, images, precision, overrides. Batches at which activations are most of it.
KEPT = "network.activation_checkpointing=false"
AGAIN = "network.activation_checkpointing=true"
CASES: dict[str, tuple[str, int, str, list[str]]] = {
    "DDPM++": ("cifar10_edm", 8, "fp32", []),
    "DDPM++, bf16": ("cifar10_edm", 16, "bf16", []),
    "ADM": ("cifar10_improved_ddpm", 12, "fp32", []),
    "simple U-ViT": ("quickstart", 384, "fp32", []),
    "JiT": ("cifar10_jit_small", 96, "fp32", [KEPT]),
    "JiT, checkpointed": ("cifar10_jit_small", 256, "fp32", [AGAIN]),
    "pyramidal": ("pyramidal_small", 48, "fp32", []),
}  # fmt: skip

MIB = 2**20


def case(name: str) -> dict[str, Any]:
    """One case, in this process."""
    experiment, images, precision, overrides = CASES[name]
    read = parts.read(experiment, [*overrides, "trainer.accelerator=cpu", "trainer.devices=1"])
    planned = Planned(read, cuda=False)
    size = planned.image_sizes[0]
    counted = planned.cost(precision != "fp32", planned.checkpointing, size).peak(images)
    state = planned.state.sum()
    torch.set_num_threads(1)
    before = resident()
    step = Step(
        config.build(read, "network"),
        config.build(read, "objective"),
        config.build(read, "optimizer"),
        planned.ema,
        (planned.channels, size.resolution, size.resolution),
    )

    def make(count: int) -> None:
        step_maker(
            step, (size.side, size.side), count, channels=planned.channels,
            precision=AUTOCAST[precision], augmented=planned.augmented, positioned=size.positioned,
        )()  # fmt: skip
        step.optimizer.zero_grad()
        gc.collect()

    make(2)
    settled = resident()
    restart_peak()
    make(images)
    peak = peak_resident()
    assert before is not None and settled is not None and peak is not None
    return {
        "experiment": " ".join([experiment, *overrides]),
        "network": type(planned.network).__name__,
        "images": images,
        "precision": precision,
        "step counted, MiB": round(counted / MIB),
        "step measured, MiB": round((peak - settled) / MIB),
        "step counted / measured": round(counted / (peak - settled), 3),
        "in all counted, MiB": round((counted + state) / MIB),
        "in all measured, MiB": round((peak - before) / MIB),
        "in all counted / measured": round((counted + state) / (peak - before), 3),
    }


def main() -> None:
    """Run every case in its process and record them."""
    if len(sys.argv) > 1:
        print(json.dumps(case(sys.argv[1])))
        return
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_MMAP_MAX_": "1000000",
        "OMP_NUM_THREADS": "1",
    }
    found = {}
    for name in CASES:
        words = [sys.executable, "-m", "benchmarks.plan", name]
        done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
    record("plan", found)


if __name__ == "__main__":
    main()
