"""Optimizer steps that are really made, for their time and the memory that they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion_pl.training.step_cost import Step, conditions

WARM_UP, STEPS = 2, 10


@dataclass(frozen=True)
class Measured:
    """Steps of one micro-batch, measured.

    Args:
        images: of the micro-batch.
        seconds: of a step, the median.
        peak: most bytes at once: of tensors on a GPU, of the process above what it had before on a
            CPU; None where the system does not say.
    """

    images: int
    seconds: float
    peak: int | None


def step_maker(
    step: Step,
    size: tuple[int, int],
    images: int,
    *,
    channels: int,
    precision: torch.dtype | None,
    augmented: bool,
    positioned: bool,
) -> Callable[[], None]:
    """A function that makes an optimizer step on made-up images.

    Args:
        step: with numbers.
        size: (H, W) of the images.
        images: of the micro-batch.
        channels: of the images.
        precision: autocast dtype, None for float32.
        augmented, positioned: as for `conditions`.
    """
    device = next(step.network.parameters()).device
    with device:
        given = conditions(step.network, images, size, augmented=augmented, positioned=positioned)
        image = torch.randint(0, 256, (images, channels, *size), dtype=torch.uint8)

    def make() -> None:
        step.optimizer.zero_grad()
        step.begin(images, device)
        with torch.autocast(device.type, precision or torch.bfloat16, enabled=bool(precision)):
            step.loss(image, given).backward()
            step.update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return make


def measure_step(build: Callable[[], Callable[[], None]], images: int) -> Measured:
    """Time ten steps after two, and see what they take.

    Args:
        build: makes the function that makes a step, and all that it needs.
        images: of the step.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before = resident()
    restart_peak()
    make = build()
    times = []
    for number in range(WARM_UP + STEPS):
        began = time.perf_counter()
        make()
        if number >= WARM_UP:
            times.append(time.perf_counter() - began)
    if torch.cuda.is_available():
        peak: int | None = torch.cuda.max_memory_allocated()
    else:
        most = peak_resident()
        peak = None if most is None or before is None else most - before
    return Measured(images, statistics.median(times), peak)


def resident() -> int | None:
    """Bytes of this process in memory; None where the system does not say."""
    return _status("VmRSS")


def peak_resident() -> int | None:
    """The most bytes of this process in memory since `restart_peak`."""
    return _status("VmHWM")


def restart_peak() -> None:
    """Begin the peak anew, on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [each.split() for each in lines if each.startswith(f"{name}:")]
    return int(found[0][1]) * 1024 if found else None
