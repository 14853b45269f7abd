"""What a training run sets beside mathematics: budget, devices, precision, intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from diffusion_pl.errors import UserError
from diffusion_pl.training.best import Best

Precision = Literal["auto", "fp32", "bf16", "fp16"]

# Numbers by which a checkpoint may be the best, and whether more is better.
HIGHER = dict.fromkeys(("fid", "fd", "sfid", "sfd", "kid", "kd"), False) | dict.fromkeys(
    ("is", "cs", "precision", "recall", "density", "coverage"), True
)

OURS = ("ddp", "fsdp")  # strategies that keep all that this package promises

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Strategy(Protocol):
    """Lightning's; not imported here."""

    def setup_environment(self) -> None: ...


class Profiler(Protocol):
    """Lightning's; not imported here."""

    def start(self, action_name: str) -> None: ...


@dataclass(frozen=True)
class TrainerConfig:
    """What the `trainer` node of an experiment says; every amount is in images, global.

    Args:
        total_images: the training budget; training ends with the step that reaches it.
        checkpoint_every: images between checkpoints.
        keep: newest checkpoints that stay, at least 1.
        keep_every: images between checkpoints that stay for good, a multiple of checkpoint_every;
            None for none.
        keep_best: a number of the evaluation, such as `fid`; the checkpoint with its best value so
            far stays as RUN/best/fid.ckpt.
        log_every: images between rows of the log.
        grad_clip: largest global norm of the gradient, None for no clipping.
        label_dropout: share of the labels hidden from the network, for guidance.
        precision: "auto" is bf16 where the device has matrix units for it, else fp32.
        devices: a node, or "auto" for all that are there.
        nodes: machines.
        strategy: "ddp", every device holds the whole model, or "fsdp", each its part of weights,
            moments and averages; the same checkpoints, and the same numbers to rounding. Another
            name of Lightning's, or a strategy of its, as docs/scaling.md says.
        accelerator: as Lightning names them: "auto", "cpu", "gpu".
        device_batch_size: largest batch of one forward pass at full resolution, and the pixels of
            so many at any other; more is accumulated. None: no limit.
        profiler: "simple", "advanced" or "pytorch", or a profiler of Lightning's; its report lies
            in RUN/profiler.
        compile: run the network through torch.compile; pays on GPUs.
        loggers: of "tensorboard" and "wandb", beside metrics.jsonl, which is always written.
        wandb_project: where W&B shows the run.
        wandb_entity: whose project it is, a user or a team; None for the user's own.
        start_timeout: seconds that a rank waits for the others until the first step is made, and
            without a pass of the network once the data is read in.
        timeout: the same from then on.
        read_timeout: seconds to wait for a batch from a reading process.
        watchdog: seconds without a pass of the network, from then on, after which a process prints
            what it was doing and ends. Metrics are no passes; precision and recall of 50,000 images
            compute longer on few cores and want more here.
    """

    total_images: int
    checkpoint_every: int
    log_every: int = 5_000
    keep: int = 2
    keep_every: int | None = None
    keep_best: str | None = None
    grad_clip: float | None = None
    label_dropout: float = 0.0
    precision: Precision = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: int = 1
    strategy: str | Strategy = "ddp"
    accelerator: str = "auto"
    device_batch_size: int | None = None
    profiler: Literal["simple", "advanced", "pytorch"] | Profiler | None = None
    compile: bool = False
    loggers: Sequence[Literal["tensorboard", "wandb"]] = ("tensorboard",)
    wandb_project: str = "diffusion_pl"
    wandb_entity: str | None = None
    start_timeout: float = 600.0
    timeout: float = 120.0
    read_timeout: float = 300.0
    watchdog: float = 600.0

    def __post_init__(self) -> None:
        for key in ("total_images", "checkpoint_every", "log_every", "keep", "nodes"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1 (got {getattr(self, key)})")
        if self.devices != "auto" and self.devices < 1:
            raise UserError(f"devices must be at least 1, or auto (got {self.devices})")
        if self.device_batch_size is not None and self.device_batch_size < 1:
            raise UserError(f"device_batch_size must be at least 1 (got {self.device_batch_size})")
        if self.keep_every is not None and (
            self.keep_every < 1 or self.keep_every % self.checkpoint_every
        ):
            raise UserError(
                f"keep_every must be a multiple of checkpoint_every, {self.checkpoint_every} "
                f"(got {self.keep_every})"
            )
        if self.keep_best is not None and self.keep_best not in HIGHER:
            raise UserError(
                f"keep_best must be one of {', '.join(HIGHER)} (got {self.keep_best!r})"
            )
        for key in ("start_timeout", "timeout", "read_timeout", "watchdog"):
            if getattr(self, key) <= 0:
                raise UserError(f"{key} must be positive seconds (got {getattr(self, key)})")
        if self.strategy == "fsdp" and self.precision == "fp16":
            raise UserError(
                "precision: fp16 does not go with strategy: fsdp, since a device sees the overflow "
                "of its own part alone; use bf16, or strategy: ddp"
            )
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"label_dropout must be in [0, 1] (got {self.label_dropout})")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise UserError(f"grad_clip must be positive or null (got {self.grad_clip})")

    def best(self, run: Path) -> Best | None:
        """Keeps the best checkpoint in a run's folder, where that is asked for."""
        name = self.keep_best
        return None if name is None else Best(run, name, higher=HIGHER[name])

    def steps(self, batch_size: int) -> int:
        """Optimizer steps that the budget takes, the last one whole."""
        return math.ceil(self.total_images / batch_size)

    def rounded_images(self, batch_size: int) -> int:
        """Images of all steps."""
        return self.steps(batch_size) * batch_size

    def per_device_batch(self, batch_size: int, world_size: int) -> int:
        """Images of one optimizer step on one device.

        Raises:
            UserError: the global batch does not divide over the devices.
        """
        if batch_size % world_size:
            raise UserError(
                f"data.batch_size: {batch_size} does not divide over {world_size} devices "
                f"(remainder {batch_size % world_size}); "
                f"use {batch_size // world_size * world_size or world_size} "
                f"or {(batch_size // world_size + 1) * world_size}"
            )
        return batch_size // world_size

    def micro_batches(self, size: int, fraction: float = 1.0) -> int:
        """Micro-batches of a device's batch, as even as they can be.

        Args:
            size: images of the step on this device.
            fraction: pixels of an image over those of a full-resolution one; a micro-batch holds
                so many more images in the same memory.
        """
        limit = size if self.device_batch_size is None else int(self.device_batch_size / fraction)
        return math.ceil(size / max(1, limit))

    def check_objective(self, objective: object) -> None:
        """See that an objective can be trained with this strategy.

        Raises:
            UserError: it has weights of its own, which fsdp would not spread.
        """
        weights = objective.parameters() if isinstance(objective, nn.Module) else ()
        if self.strategy == "fsdp" and any(True for _ in weights):
            raise UserError(
                f"strategy: fsdp spreads the network alone, and the objective "
                f"{type(objective).__name__} has weights of its own; use ddp"
            )

    def device_type(self) -> str:
        """Where the run computes, "cpu" or "cuda", by `accelerator`."""
        wants_gpu = self.accelerator in ("gpu", "cuda")
        on_gpu = wants_gpu or (self.accelerator == "auto" and torch.cuda.is_available())
        return "cuda" if on_gpu else "cpu"

    def devices_per_node(self) -> int:
        """Devices, and so ranks, of each node."""
        if self.devices != "auto":
            return self.devices
        return torch.cuda.device_count() if self.device_type() == "cuda" else 1


def resolve_precision(precision: Precision, device: str) -> str:
    """What "auto" means on this machine: "bf16" where matrix units for it exist, else "fp32".

    A CPU without AMX computes bf16 by emulation, up to 40 times slower than fp32 (measured); with
    AMX it is about 2.5 times faster.
    """
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    return "bf16" if _cpu_has_amx() else "fp32"


def _cpu_has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False  # not Linux
