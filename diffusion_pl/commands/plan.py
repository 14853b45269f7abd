"""`plan`: what a run will need and how long it will take, before it is started."""

from __future__ import annotations

import math
import os
from typing import Any

from diffusion_pl.commands import hints, parts
from diffusion_pl.commands.compare import table
from diffusion_pl.commands.options import Allow, Integer
from diffusion_pl.commands.planned import Planned, size_of, usable
from diffusion_pl.commands.results import Result, line
from diffusion_pl.errors import UserError
from diffusion_pl.training.hardware import GPU, GPUS, gpu_here, gpu_named
from diffusion_pl.training.settings import AUTOCAST, resolve_precision
from diffusion_pl.training.step_timing import Measured, measure_step

COMMON = ("RTX 4090", "A100 80GB", "H100", "H200", "B200")  # where no GPU is named
NO_PROMPTS = "evaluation.prompts=null"  # a file that need not be there to plan
MOST_PARTS = 8  # rows of the table of parameters

GIB = 2**30


def command(
    experiment: str,
    /,
    *overrides: str,
    gpu: str | None = None,
    nodes: Integer | None = None,
    gpus: Integer | None = None,
    efficiency: float = 0.35,
    measure: bool = False,
    allow: Allow = (),
) -> Result:
    """Plan a run: parameters, memory, images/s, days, evaluations, disk; nothing is trained.

    Memory and FLOPs are counted from the experiment's own network, objective and optimizer, without
    a GPU. Speed is a share of the GPU's peak, or measured on this machine.

    Example: diffusion_pl plan imagenet64_edm --gpu H200 --nodes 4 --gpus 8

    Args:
        experiment: a name, or a YAML file anywhere.
        overrides: KEY=VALUE, such as trainer.precision=bf16.
        gpu: of the run, such as H200 or "A100 80GB"; this machine's, or the common ones, when
            not given.
        nodes: number of nodes; the experiment's when not given.
        gpus: per node; the experiment's, or 1, when not given.
        efficiency: assumed share of the GPU's peak speed.
        measure: time ten steps on this machine.
    """
    if not 0 < efficiency <= 1:
        raise UserError(f"--efficiency: is a share of the peak, in (0, 1] (got {efficiency:g})")
    named = gpu_here() if gpu is None else gpu_named(gpu)
    words = list(overrides)
    trainer = parts.read(experiment, [*words, NO_PROMPTS], allow=allow).tree["trainer"]
    for_cpu = trainer.get("accelerator") == "cpu"
    if gpu is not None and for_cpu:  # an experiment for a CPU, asked of a GPU
        words.append("trainer.accelerator=gpu")
    one = gpus is None and (
        trainer.get("devices", "auto") == "auto" or (gpu is not None and for_cpu)
    )
    on_cpu = gpu is None and (for_cpu or (measure and named is None))
    words += [] if nodes is None else [f"trainer.nodes={nodes}"]
    words += [] if gpus is None else [f"trainer.devices={gpus}"]
    assumed = [*words, *(["trainer.devices=1"] if one else []), NO_PROMPTS]
    planned = Planned(parts.read(experiment, assumed, allow=allow), cuda=not on_cpu)
    target = None if on_cpu else named
    targets = [target] if target else [] if on_cpu else [GPUS[name] for name in COMMON]
    precision = _precision(planned, target, on_cpu)
    plan = Plan(experiment, words, planned, precision, target, targets, efficiency, on_cpu)
    if measure:
        plan.measure()
    lines = [*plan.head(), "", *plan.parameters(), "", *plan.memory(), "", *plan.time(), "",
             *plan.evaluations(), *plan.disk()]  # fmt: skip
    return Result(plan.values(), lines, [plan.next()], in_pipes=True)


def _precision(planned: Planned, target: GPU | None, on_cpu: bool) -> str:
    """fp32, bf16 or fp16, as the run would resolve it on that device."""
    setting = planned.settings.precision
    if setting != "auto":
        return setting
    if on_cpu:
        return resolve_precision(setting, "cpu")
    return "bf16" if target is None or target.bf16 else "fp32"


class Plan:
    """A plan and its lines.

    Args:
        experiment: its name.
        words: overrides.
        planned: what is counted.
        precision: fp32, bf16 or fp16.
        target: the GPU; None for a CPU, or where none is named.
        targets: the GPUs whose time is told.
        efficiency: share of their peak.
        on_cpu: plan for a CPU.
    """

    def __init__(
        self,
        experiment: str,
        words: list[str],
        planned: Planned,
        precision: str,
        target: GPU | None,
        targets: list[GPU],
        efficiency: float,
        on_cpu: bool,
    ) -> None:
        self.experiment, self.words, self.planned = experiment, words, planned
        self.precision, self.half = precision, precision != "fp32"
        self.target, self.targets = target, targets
        self.efficiency, self.on_cpu = efficiency, on_cpu
        self.speeds = {each.name: planned.speed(each, self.half, efficiency) for each in targets}
        self.measured: Measured | None = None

    def measure(self) -> None:
        """Time ten steps on this machine, in the largest micro-batch of the run that fits it."""
        if self.target is not None and gpu_here() is None:
            raise UserError(
                f"--measure: times this machine, which has no {self.target.name}; leave out "
                "--measure, or type the command there"
            )
        memory = self.memory_here()
        largest = self.planned.largest(memory, self.half, self.planned.checkpointing)
        images = min(self.planned.micro_batch, largest)
        if not images:
            raise UserError(f"--measure: a step of one image does not fit {_gib(memory)} GiB")
        dtype = AUTOCAST[self.precision]
        self.measured = measure_step(lambda: self.planned.real_step(images, dtype), images)

    def memory_here(self) -> int:
        """Bytes of the device, or that this machine has left for each process of a CPU."""
        if self.target is not None:
            return self.target.memory
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages // self.planned.settings.devices_per_node()

    def head(self) -> list[str]:
        """What is planned."""
        planned, settings = self.planned, self.planned.settings
        side = planned.data.dataset.resolution
        devices = f"{settings.nodes} x {settings.devices_per_node()}"
        if self.target is not None:
            peak = self.target.peak(self.precision) / 1e12
            kind = f"{self.target.name} ({_gib(self.target.memory)} GiB, {peak:,.0f} TFLOP/s)"
        else:
            kind = "CPU process" if self.on_cpu else "GPU"
        strategy = settings.strategy if isinstance(settings.strategy, str) else "own strategy"
        of = f" in micro-batches of {planned.micro_batch:,}"
        return [
            line(
                "network", f"{type(planned.network).__name__}, {planned.channels} x {side} x {side}"
            ),
            line(
                "devices",
                f"{devices} {kind}, {self.precision}{f', {strategy}' * (planned.ranks > 1)}",
            ),
            line(
                "batch",
                f"{planned.data.batch_size:,} images, {planned.device_batch:,} a device"
                f"{of if planned.micro_batch < planned.device_batch else ''}; "
                f"{planned.images:,} in all",
            ),
        ]

    def parameters(self) -> list[str]:
        """Parameters by part, the largest first, and FLOPs."""
        found = sorted(self.planned.parameters.items(), key=lambda item: -item[1])
        total = sum(self.planned.parameters.values())
        rows = [[name, f"{count:,}", f"{100 * count / total:.1f} %"] for name, count in found]
        if len(rows) > MOST_PARTS:
            beyond = sum(count for _, count in found[MOST_PARTS - 1 :])
            more = f"{len(rows) - MOST_PARTS + 1} smaller parts"
            rows = [*rows[: MOST_PARTS - 1], [more, f"{beyond:,}", f"{100 * beyond / total:.1f} %"]]
        rows.append(["in all", f"{total:,}", ""])
        lines = table(["part", "parameters", "share"], rows)
        lines.append("")
        rows = []
        for size in self.planned.image_sizes:
            forward = self.planned.forward(size.side, self.half).flops
            training = self.planned.cost(self.half, self.planned.checkpointing, size).flops
            share = f"{100 * size.share:.0f} %"
            cut = f" cut to {size.side}" if size.side < size.resolution else ""
            rows.append([f"{size.resolution} px{cut}", share, _flops(forward), _flops(training)])
        lines += table(["FLOPs an image", "steps", "forward", "training"], rows)
        return [*lines, "(2 of a multiply-add; training is forward and backward)"]

    def memory(self) -> list[str]:
        """The state, and the activations by precision and checkpointing."""
        planned, state = self.planned, self.planned.state
        shards = planned.ranks if planned.sharded else 1
        kinds = {
            "weights": state.weights / shards,
            "gradients": state.gradients / shards,
            "moments": state.moments / shards,
            "averages": state.averages / shards,
            "other": planned.resident() - state.sum(shards) + state.rows,
        }
        lines = table(
            ["GiB of a device", *kinds], [["state", *(_gib(size) for size in kinds.values())]]
        )
        lines += ["", *table(self._columns(), [self._row(*each) for each in self.variants()])]
        fits = f"{_gib(usable(self.memory_of()))} GiB are usable" if self.memory_of() else ""
        lines.append(f"* as set; peaks with the state; {fits or 'name a --gpu to see what fits'}")
        if self.planned.settings.compile:
            lines.append("counted without trainer.compile, which takes less")
        return lines

    def memory_of(self) -> int:
        """Bytes of the device that is planned for; 0 where none is named."""
        if self.target is None and not self.on_cpu:
            return 0
        return self.memory_here()

    def variants(self) -> list[tuple[bool, bool | None]]:
        """Precision (half) and checkpointing, those that there are."""
        switches = [None] if self.planned.checkpointing is None else [False, True]
        return [(half, switch) for half in (True, False) for switch in switches]

    def _columns(self) -> list[str]:
        peak = f"peak of {self.planned.micro_batch:,}, GiB"
        head = ["precision, checkpointing", "MiB an image", peak]
        return [*head, "largest micro-batch"] if self.memory_of() else head

    def _row(self, half: bool, checkpointing: bool | None) -> list[str]:
        planned, micro = self.planned, self.planned.micro_batch
        precision = (self.precision if self.half else "bf16") if half else "fp32"
        switch = {None: "", False: ", off", True: ", on"}[checkpointing]
        mark = " *" if (half, checkpointing) == (self.half, planned.checkpointing) else ""
        cost = planned.cost(half, checkpointing, planned.image_sizes[0])
        row = [
            f"{precision}{switch}{mark}",
            f"{cost.per_image(max(micro, 8)) / 2**20:,.1f}",
            _gib(planned.memory(micro, half, checkpointing)),
        ]
        if memory := self.memory_of():
            largest = planned.largest(memory, half, checkpointing)
            all_of = " (all)" if largest == planned.device_batch else ""
            row.append(f"{largest:,}{all_of}" if largest else "none")
        return row

    def time(self) -> list[str]:
        """Images a second and days."""
        rows = []
        for gpu in self.targets:
            speed = self.speeds[gpu.name]
            each = f"{self.planned.ranks} x {gpu.name}{' +' * speed.launching}"
            if speed.micro_batch:
                rows.append([
                    each, f"{speed.micro_batch:,}", _rate(speed.images_per_second),
                    lasting(speed.training), lasting(speed.evaluations), lasting(speed.seconds),
                ])  # fmt: skip
            else:
                rows.append([each, "none fits", "", "", "", ""])
        if self.measured is not None:
            rows.append(self._measured_row())
        if not rows:
            return ["time: add --measure to time ten steps here, or --gpu to plan for a GPU"]
        head = ["devices", "micro-batch", "images/s", "training", "evaluations", "in all"]
        lines = table(head, rows)
        if self.targets:
            lines.append(
                f"at {100 * self.efficiency:.0f} % of the peak, which is assumed (--efficiency; "
                "--measure there tells);"
            )
            lines.append("without communication, data and compile")
        if any(speed.launching for speed in self.speeds.values()):
            lines.append("+ so little work a pass that launching its kernels takes longer")
        return [*lines, *self._measured_lines()]

    def _measured_row(self) -> list[str]:
        found = self.measured
        assert found is not None
        training = self.planned.images / self.images_per_second()
        more = lasting(math.nan)
        return [
            "measured here", f"{found.images:,}", _rate(self.images_per_second()),
            lasting(training), more, "",
        ]  # fmt: skip

    def images_per_second(self) -> float:
        """Measured, of all devices; processes of a CPU share its cores."""
        assert self.measured is not None
        devices = self.planned.settings.nodes if self.on_cpu else self.planned.ranks
        return devices * self.measured.images / self.measured.seconds

    def _measured_lines(self) -> list[str]:
        if self.measured is None:
            return []
        counted = self.planned.state.sum() + self._step_peak(self.measured.images)
        flops = self.planned.cost(
            self.half, self.planned.checkpointing, self.planned.image_sizes[0]
        ).flops
        rate = flops * self.measured.images / self.measured.seconds
        share = (
            f", {100 * rate / self.target.peak(self.precision):.0f} % of the peak"
            if self.target
            else ""
        )
        peak = self.measured.peak
        took = "" if peak is None else f"; peak {_gib(peak)} GiB, counted {_gib(counted)}"
        return [
            f"measured: the median of ten steps of {self.measured.images:,} images, "
            f"{self.measured.seconds:.3g} s,",
            f"{_flops(rate)}FLOP/s{share}{took}",
        ]

    def _step_peak(self, images: int) -> int:
        size = self.planned.image_sizes[0]
        return self.planned.cost(self.half, self.planned.checkpointing, size).peak(images)

    def evaluations(self) -> list[str]:
        """What an evaluation costs."""
        planned, settings = self.planned, self.planned.evaluation
        by_size = ", ".join(f"{side} px: {count:,}" for side, count in planned.calls.items())
        how = f" ({by_size})" if len(planned.calls) > 1 else ""
        features = planned.feature_flops
        more = "features not counted" if features is None else f"features {_flops(features)}"
        return [
            line("evaluate", f"{planned.evaluations:,} times {settings['count']:,} images"),
            line("", f"{sum(planned.calls.values()):,} network evaluations an image{how}"),
            line("", f"{_flops(planned.evaluation_flops(self.half))}FLOP a time, {more.strip()}"),
            line("", self._grown()),
        ]

    def _grown(self) -> str:
        """What all evaluations are of the training's work."""
        planned = self.planned
        work = planned.evaluations * (
            planned.evaluation_flops(self.half) + (planned.feature_flops or 0.0)
        )
        training = planned.images * sum(
            size.share * planned.cost(self.half, planned.checkpointing, size).flops
            for size in planned.image_sizes
        )
        return f"all of them: {100 * work / training:.3g} % of the training's work"

    def disk(self) -> list[str]:
        """Checkpoints, snapshots, data."""
        planned = self.planned
        size, kept = planned.checkpoint_bytes(), planned.kept()
        stay = f"{kept:,} checkpoints of {size_of(size)} stay, {size_of(kept * size)}"
        lines = [line("disk", f"{stay}; and one while it is written")]
        if snapshots := planned.snapshot_bytes():
            lines.append(line("", f"snapshots of averages: {size_of(snapshots)}"))
        return [*lines, line("data", planned.data_line())]

    def next(self) -> str:
        """The command that trains so."""
        planned, words = self.planned, list(self.words)
        memory = self.memory_of()
        if memory and planned.memory(
            planned.micro_batch, self.half, planned.checkpointing
        ) > usable(memory):
            largest = planned.largest(memory, self.half, planned.checkpointing)
            if not largest and planned.checkpointing is False:
                return hints.next_line(
                    "plan", self.experiment, *words, "network.activation_checkpointing=true"
                )
            if largest:
                words.append(f"trainer.device_batch_size={largest}")
        if planned.settings.nodes > 1:
            nodes, gpus = planned.settings.nodes, planned.settings.devices_per_node()
            words = [
                each
                for each in words
                if not each.startswith(("trainer.nodes=", "trainer.devices="))
            ]
            return hints.next_line(
                "launch", self.experiment, *words, "--nodes", nodes, "--gpus", gpus
            )
        return hints.next_line("train", self.experiment, *words)

    def values(self) -> dict[str, Any]:
        """The plan as JSON."""
        planned = self.planned
        first = planned.image_sizes[0]
        cost = planned.cost(self.half, planned.checkpointing, first)
        return {
            "experiment": self.experiment,
            "precision": self.precision,
            "devices": planned.ranks,
            "parameters": planned.parameters,
            "flops": {
                "forward": planned.forward(first.side, self.half).flops,
                "training": cost.flops,
            },
            "state_bytes": vars(planned.state),
            "activations": [
                {
                    "precision": "half" if half else "fp32",
                    "checkpointing": switch,
                    "bytes_an_image": planned.cost(half, switch, first).per_image(64),
                    "peak_bytes": planned.memory(planned.micro_batch, half, switch),
                    "largest": planned.largest(self.memory_of(), half, switch)
                    if self.memory_of()
                    else None,
                }
                for half, switch in self.variants()
            ],
            "micro_batch": planned.micro_batch,
            "efficiency": self.efficiency,
            "speeds": {
                name: {key: _known(each) for key, each in vars(speed).items()}
                for name, speed in self.speeds.items()
            },
            "measured": None if self.measured is None else vars(self.measured),
            "evaluations": {
                "times": planned.evaluations,
                "images": planned.evaluation["count"],
                "network_evaluations": dict(planned.calls),
                "flops": planned.evaluation_flops(self.half),
            },
            "checkpoint_bytes": planned.checkpoint_bytes(),
            "checkpoints_kept": planned.kept(),
            "snapshot_bytes": planned.snapshot_bytes(),
        }


def lasting(seconds: float) -> str:
    """A time for people: 12 s, 5 min, 3.4 h, 12.5 days."""
    if math.isnan(seconds):
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def _known(value: float) -> float | None:
    return None if isinstance(value, float) and math.isnan(value) else value


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size < 100 * GIB else f"{size / GIB:,.0f}"


def _flops(count: float) -> str:
    """A count with its prefix: 42.4 G."""
    for prefix, power in (("E", 18), ("P", 15), ("T", 12), ("G", 9), ("M", 6)):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {prefix}"
    return f"{count:.0f} "
