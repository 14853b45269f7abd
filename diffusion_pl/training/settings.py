"""The `trainer` section of an experiment: budget, devices, precision, intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from diffusion_pl.diffusion.conditions import check_dropout
from diffusion_pl.diffusion.objective import NeedsNetwork
from diffusion_pl.errors import UserError
from diffusion_pl.training.best import HIGHER, Best

Precision = Literal["auto", "fp32", "bf16", "fp16"]

OURS = ("ddp", "fsdp")  # this package's own strategies

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Strategy(Protocol):
    """Lightning's; not imported here."""

    def setup_environment(self) -> None: ...


class Profiler(Protocol):
    """Lightning's; not imported here."""

    def start(self, action_name: str) -> None: ...


@dataclass(frozen=True)
class TrainerConfig:
    """The `trainer` section of an experiment; amounts are in images over all devices.

    Args:
        total_images: the training budget; training ends with the step that reaches it.
        checkpoint_every: images between checkpoints.
        keep: how many of the newest checkpoints stay, at least 1.
        keep_every: images between checkpoints that stay for good, a multiple of checkpoint_every;
            None for none.
        keep_best: a metric of the evaluation, such as `fid`; the checkpoint with its best value
            stays as RUN/best/fid.ckpt.
        log_every: images between rows of the log.
        grad_clip: largest global norm of the gradient, None for no clipping.
        dropout: probability that a condition is hidden from the network, by its kind, such as
            {label: 0.1, text: 0.1}; each on its own, for guidance.
        precision: "auto" is bf16 where the device has matrix units for it, else fp32.
        devices: per node, or "auto" for all.
        nodes: machines.
        strategy: "ddp": every device holds the whole model; "fsdp": each a shard of weights,
            moments and averages; the same checkpoints, and the same numbers up to rounding. Or a
            strategy of Lightning's, by name or built, see docs/scaling.md.
        accelerator: Lightning's: "auto", "cpu", "gpu".
        device_batch_size: largest micro-batch at full resolution; at others as many pixels. The
            gradient of a larger batch is accumulated. None: no limit.
        profiler: "simple", "advanced" or "pytorch", or a profiler of Lightning's; it writes to
            RUN/profiler.
        compile: run the network through torch.compile; pays on GPUs. "blocks": each block by
            itself, which starts sooner and takes any network whose blocks lie in an nn.ModuleList.
        loggers: "tensorboard", "wandb"; metrics.jsonl is always written.
        wandb_project: W&B project.
        wandb_entity: W&B user or team; None for the user's default.
        start_timeout: seconds, until the first step is done: how long ranks wait for one another,
            and the longest time without a forward pass once the data is open.
        timeout: seconds after the first step that ranks wait for one another.
        read_timeout: seconds to wait for a batch from a data worker.
        watchdog: seconds without a forward pass, after the first step, until a process prints its
            stacks and ends. Metrics make no forward passes: precision and recall of 50,000 images
            may need more on few cores.
    """

    total_images: int
    checkpoint_every: int
    log_every: int = 5_000
    keep: int = 2
    keep_every: int | None = None
    keep_best: str | None = None
    grad_clip: float | None = None
    dropout: Mapping[str, float] = field(default_factory=dict)
    precision: Precision = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: int = 1
    strategy: str | Strategy = "ddp"
    accelerator: str = "auto"
    device_batch_size: int | None = None
    profiler: Literal["simple", "advanced", "pytorch"] | Profiler | None = None
    compile: bool | Literal["blocks"] = False
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
        check_dropout(self.dropout)
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise UserError(f"grad_clip must be positive or null (got {self.grad_clip})")

    def best(self, run: Path) -> Best | None:
        """Keeper of the best checkpoint; None without `keep_best`."""
        name = self.keep_best
        return None if name is None else Best(run, name, higher=HIGHER[name])

    def world_size(self) -> int:
        """Ranks of the run: the devices of all nodes."""
        return self.nodes * self.devices_per_node()

    def steps(self, batch_size: int) -> int:
        """Optimizer steps of the budget, rounded up."""
        return math.ceil(self.total_images / batch_size)

    def rounded_images(self, batch_size: int) -> int:
        """Images of all steps: the budget rounded up to whole batches."""
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
        """Check that the strategy can train an objective.

        Raises:
            UserError: fsdp, and the objective has weights of its own, which would not be sharded;
                or a network compiled as a whole, of which it reads what is run again.
        """
        weights = objective.parameters() if isinstance(objective, nn.Module) else ()
        if self.strategy == "fsdp" and any(True for _ in weights):
            raise UserError(
                f"strategy: fsdp shards the network alone, and the objective "
                f"{type(objective).__name__} has weights of its own; use ddp"
            )
        if self.compile is True and isinstance(objective, nn.Module):
            for part in objective.modules():
                if isinstance(part, NeedsNetwork) and part.checkpointed:
                    # A compiled checkpoint drops what a hook in it keeps.
                    raise UserError(
                        f"compile: a network that is compiled as a whole with activation "
                        f"checkpointing hides its blocks from {type(part).__name__}; set "
                        "trainer.compile=blocks, or network.activation_checkpointing=false"
                    )

    def device_type(self) -> str:
        """ "cpu" or "cuda", by `accelerator`."""
        wants_gpu = self.accelerator in ("gpu", "cuda")
        on_gpu = wants_gpu or (self.accelerator == "auto" and torch.cuda.is_available())
        return "cuda" if on_gpu else "cpu"

    def devices_per_node(self) -> int:
        """Devices, hence ranks, of each node."""
        if self.devices != "auto":
            return self.devices
        return torch.cuda.device_count() if self.device_type() == "cuda" else 1


def check_augment(augment: object, network: nn.Module) -> None:
    """Refuse an augmentation whose label the network does not take.

    Raises:
        UserError: says the lengths of both.
    """
    length = getattr(augment, "labels", None)
    taken = getattr(network, "augment", length)
    if length != taken and length is not None:
        raise UserError(
            f"augment: tells the network {length} numbers of each image, and this network takes "
            f"{taken}; set network.augment={length} where it has that setting, or augment=null"
        )


def resolve_precision(precision: Precision, device: str) -> str:
    """Resolve "auto": "bf16" where this machine has matrix units for it, else "fp32".

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
