"""What a run will cost, counted from the experiment's own parts: memory, time, disk."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_pl import config
from diffusion_pl.commands import parts
from diffusion_pl.config import Config
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.shard_format import MANIFEST, Manifest
from diffusion_pl.data.shards import Shards
from diffusion_pl.diffusion.classifier_free import is_plain, removable
from diffusion_pl.diffusion.conditions import sizes
from diffusion_pl.diffusion.guidance import guided
from diffusion_pl.diffusion.objective import TrainingObjective
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.samplers.pyramid import PyramidSampler
from diffusion_pl.training.compiling import compile_network
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.hardware import GPU, RESERVED
from diffusion_pl.training.settings import TrainerConfig
from diffusion_pl.training.sharding import units
from diffusion_pl.training.step_cost import (
    ForwardCost,
    State,
    Step,
    StepCost,
    conditions,
    count_forward,
    count_step,
    state_of,
    weightless,
    without_contents,
    without_numbers,
)
from diffusion_pl.training.step_timing import step_maker

# A forward pass of the published network over 299 x 299 pixels, by torch's counter.
INCEPTION_FLOPS = 11.43e9
LAUNCH_SECONDS = 5e-6  # of a kernel, without compile: an assumption; 1,400 of them are 7 ms
UPDATE_BYTES = 40  # of a parameter: Adam moves 28, the average 12


@dataclass(frozen=True)
class Size:
    """Images of one size, in a share of the steps.

    Args:
        resolution: of the images.
        side: what the network sees of them; less for crops.
        share: of the steps.
        positioned: whether the network is told where a crop lies.
    """

    resolution: int
    side: int
    share: float
    positioned: bool


@dataclass(frozen=True)
class Speed:
    """How fast a GPU would be.

    Args:
        micro_batch: images that a pass takes at full resolution; 0 where not one fits.
        largest: images that fit.
        images_per_second: over all devices.
        training: seconds of the training.
        evaluations: seconds of all evaluations.
        launching: whether kernels take longer to launch than to compute.
    """

    micro_batch: int
    largest: int
    images_per_second: float
    training: float
    evaluations: float
    launching: bool

    @property
    def seconds(self) -> float:
        """Of the run."""
        return self.training + self.evaluations


@dataclass
class Planned:
    """An experiment whose step is counted, part by part as it is asked for.

    Args:
        experiment: checked.
        cuda: count for a GPU rather than a CPU.
    """

    experiment: Config
    cuda: bool
    _steps: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        build = config.build
        self.settings: TrainerConfig = build(self.experiment, "trainer")
        self.data: DataConfig = build(self.experiment, "data")
        self.ema: EMA = build(self.experiment, "ema")
        self.objective: TrainingObjective = build(self.experiment, "objective")
        counted: TrainingObjective = build(self.experiment, "objective")  # checks its numbers
        self.evaluation = parts.with_defaults(self.experiment.tree["evaluation"])
        self.ranks = self.settings.world_size()
        self.device_batch = parts.device_batch(self.experiment, self.settings, self.ranks)
        self.world = weightless()
        with without_numbers(self.world):
            self.network: Any = build(self.experiment, "network")
            self.step = Step(
                self.network,
                without_contents(counted),
                build(self.experiment, "optimizer"),
                self.ema,
                (self.channels, self.data.dataset.resolution, self.data.dataset.resolution),
            )
            self.state: State = state_of(self.step, foreach=self.cuda)

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.data.dataset.channels

    @property
    def augmented(self) -> bool:
        """Whether there is an augmentation."""
        return self.experiment.tree.get("augment") is not None

    @property
    def images(self) -> int:
        """The budget, in whole steps."""
        return self.settings.rounded_images(self.data.batch_size)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters of the network's parts, by name, and of the objective, if it has any."""
        own = {name: _count(part) for name, part in self.network.named_children()}
        rest = sum(each.numel() for each in self.network.parameters(recurse=False))
        found = {**own, "others": rest}
        if isinstance(self.step.objective, nn.Module):
            found["objective"] = _count(self.step.objective)
        return {name: count for name, count in found.items() if count}

    @cached_property
    def image_sizes(self) -> list[Size]:
        """The sizes of the training steps, largest first."""
        weights = self.data.resolution_weights or {self.data.dataset.resolution: 1.0}
        crop, total = self.data.crop, sum(weights.values())
        found = []
        for resolution, weight in weights.items():
            cut = crop is not None and crop.size < resolution
            side = crop.size if crop is not None and cut else resolution
            told = crop is not None and cut and crop.return_position
            found.append(Size(resolution, side, weight / total, told))
        return sorted(found, key=lambda size: -size.side)

    @property
    def checkpointing(self) -> bool | None:
        """Whether activations are checkpointed; None for a network without that setting."""
        return getattr(self.network, "activation_checkpointing", None)

    def cost(self, half: bool, checkpointing: bool | None, size: Size) -> StepCost:
        """The cost of a step, once counted.

        Args:
            half: in bf16 or fp16.
            checkpointing: as the network's setting.
            size: of the images.

        Raises:
            UserError: the step needs numbers.
        """
        key = half, checkpointing, size.side, size.positioned
        if key not in self._steps:
            before = self.checkpointing
            if checkpointing is not None:
                self.network.activation_checkpointing = checkpointing
            try:
                with without_numbers(self.world):
                    self._steps[key] = count_step(
                        self.step,
                        (size.side, size.side),
                        channels=self.channels,
                        precision=torch.bfloat16 if half else None,
                        cuda=self.cuda,
                        augmented=self.augmented,
                        positioned=size.positioned,
                    )
            finally:
                if before is not None:
                    self.network.activation_checkpointing = before
        found: StepCost = self._steps[key]
        return found

    def forward(self, side: int, half: bool) -> ForwardCost:
        """The cost of a network evaluation, once counted."""
        key = side, half
        if key not in self._steps:
            with without_numbers(self.world):
                self._steps[key] = count_forward(
                    self.step,
                    (side, side),
                    channels=self.channels,
                    precision=torch.bfloat16 if half else None,
                    cuda=self.cuda,
                )
        found: ForwardCost = self._steps[key]
        return found

    @property
    def sharded(self) -> bool:
        """Whether ranks share the state."""
        return self.settings.strategy == "fsdp" and self.ranks > 1

    def resident(self) -> int:
        """Bytes that stay on a device, with what a strategy adds."""
        if self.sharded:
            blocks = sorted(4 * _count(unit) for unit in units(self.network))
            return self.state.sum(self.ranks) + sum(blocks[-2:])
        buckets = self.state.gradients if self.ranks > 1 else 0  # DDP's copies of the gradients
        return self.state.sum() + buckets

    def memory(self, micro: int, half: bool, checkpointing: bool | None) -> int:
        """Most bytes on a device at once in training.

        Args:
            micro: images of a micro-batch at full resolution.
            half, checkpointing: as for `cost`.
        """
        peaks = []
        for size in self.image_sizes:
            cost = self.cost(half, checkpointing, size)
            taken = self.scaled(micro, size)
            peak = cost.peak(
                taken,
                accumulating=taken < self.device_batch,
                shards=self.ranks if self.sharded else 1,
            )
            peaks.append(peak + (self.device_batch - taken) * cost.inputs)
        return self.resident() + max(peaks)

    def scaled(self, micro: int, size: Size) -> int:
        """Images of a micro-batch at a size, of as many pixels."""
        whole = self.data.dataset.resolution
        return max(1, min(self.device_batch, int(micro * (whole / size.side) ** 2)))

    @property
    def micro_batch(self) -> int:
        """Images of a micro-batch at full resolution, as set."""
        return math.ceil(self.device_batch / self.settings.micro_batches(self.device_batch))

    def largest(self, memory: int, half: bool, checkpointing: bool | None) -> int:
        """Images of the largest micro-batch that fits a device's memory, at most the device's
        batch; 0 where not one does.

        Args:
            memory: bytes.
            half, checkpointing: as for `cost`.
        """
        low, high = 0, self.device_batch
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.memory(middle, half, checkpointing) <= usable(memory)
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    @cached_property
    def calls(self) -> Counter[int]:
        """Network evaluations of a sampled image, by the side of what the network sees."""
        return network_calls(self.experiment, self.objective, self.network, self.settings)

    @property
    def evaluations(self) -> int:
        """Evaluations of the run: at every multiple of `every`, and at the end."""
        return math.ceil(self.images / self.evaluation["every"])

    def evaluation_flops(self, half: bool) -> float:
        """FLOPs of an evaluation's sampling."""
        image = sum(count * self.forward(side, half).flops for side, count in self.calls.items())
        return float(self.evaluation["count"] * image)

    @property
    def feature_flops(self) -> float | None:
        """FLOPs of an evaluation's features; None of an extractor that is not known."""
        if not self.evaluation["metrics"]:
            return 0.0
        name = self.experiment.tree["features"].get("name", "auto")
        known = name in ("auto", "inception")
        return self.evaluation["count"] * INCEPTION_FLOPS if known else None

    def checkpoint_bytes(self) -> int:
        """Of a checkpoint: weights, averages, moments, whole."""
        return self.state.weights + self.state.averages + self.state.moments

    def kept(self) -> int:
        """Checkpoints that lie on the disk in the end."""
        settings = self.settings
        written = math.ceil(self.images / settings.checkpoint_every)
        for_good = self.images // settings.keep_every if settings.keep_every else 0
        newest = min(settings.keep, written)
        return min(written, newest + for_good) + (settings.keep_best is not None)

    def snapshot_bytes(self) -> int:
        """Of all snapshots of post-hoc averages."""
        if not self.ema.posthoc_every:
            return 0
        return math.ceil(self.images / self.ema.posthoc_every) * self.state.averages * 2 // 3

    def speed(self, gpu: GPU, half: bool, efficiency: float) -> Speed:
        """How fast a GPU of the table would be.

        Args:
            gpu: one of all devices.
            half: in bf16 or fp16.
            efficiency: share of its peak.
        """
        largest = self.largest(gpu.memory, half, self.checkpointing)
        micro = min(largest, self.micro_batch)
        rate = gpu.peak(self.half_name(gpu) if half else "fp32") * efficiency
        training = evaluations = math.nan
        launching = False
        if micro:
            seconds = self.state.gradients / 4 * UPDATE_BYTES / gpu.bandwidth
            for size in self.image_sizes:
                cost = self.cost(half, self.checkpointing, size)
                passes = math.ceil(self.device_batch / self.scaled(micro, size))
                computed = self.device_batch * cost.flops / rate
                launched = passes * cost.kernels * LAUNCH_SECONDS
                launching |= launched > computed
                seconds += size.share * max(computed, launched)
            training = seconds * self.images / self.data.batch_size
            evaluations = self.evaluations * self._evaluation_seconds(rate, half)
        return Speed(micro, largest, self.images / training, training, evaluations, launching)

    def half_name(self, gpu: GPU) -> str:
        """bf16 or fp16, whichever would be trained in on a GPU."""
        if self.settings.precision in ("bf16", "fp16"):
            return self.settings.precision
        return "bf16" if gpu.bf16 else "fp16"

    def _evaluation_seconds(self, rate: float, half: bool) -> float:
        """Of one evaluation, its images spread over the ranks."""
        images = math.ceil(self.evaluation["count"] / self.ranks)
        batches = math.ceil(images / self.evaluation["batch_size"])
        seconds = (self.feature_flops or 0.0) / self.ranks / rate
        for side, count in self.calls.items():
            cost = self.forward(side, half)
            computed = images * count * cost.flops / rate
            seconds += max(computed, batches * count * cost.kernels * LAUNCH_SECONDS)
        return seconds

    def real_step(self, images: int, precision: torch.dtype | None) -> Callable[[], None]:
        """Build the step with numbers, on this machine's device; a function that makes it."""
        device = torch.device(self.settings.device_type())
        network: nn.Module = config.build(self.experiment, "network").to(device)
        objective: TrainingObjective = config.build(self.experiment, "objective")
        if isinstance(objective, nn.Module):
            objective.to(device)
        compile_network(network, self.settings.compile)
        size = self.image_sizes[0]
        with device:
            step = Step(
                network,
                objective,
                config.build(self.experiment, "optimizer"),
                self.ema,
                (self.channels, self.data.dataset.resolution, self.data.dataset.resolution),
            )
        return step_maker(
            step,
            (size.side, size.side),
            images,
            channels=self.channels,
            precision=precision,
            augmented=self.augmented,
            positioned=size.positioned,
        )

    def data_line(self) -> str:
        """What the data takes on the disk, as far as it can be told."""
        source = self.data.dataset
        path = parts.data_folder(source)
        raw = self.channels * source.resolution**2
        if isinstance(source, Shards) and parts.is_made_later(source) and source.made_of:
            count, sides = source.made_of.source.count, source.made_of.recipe.resolutions
            if count:
                most = count * self.channels * sum(side**2 for side in sides)
                return f"made at the first start, at most {size_of(most)} (its raw pixels)"
        if path is None or not path.exists():
            path = Path(getattr(source, "path", "") or "")
            if not path.parts:
                return "drawn in memory, nothing on the disk"
            if not path.exists():
                return f"{path} is not there; {size_of(raw)} of raw pixels an image"
        if (path / MANIFEST).exists():
            manifest = Manifest.read(path)
            total = sum(shard.bytes for shard in manifest.shards)
            return f"{path}, {size_of(total)} in {len(manifest.shards):,} shards"
        files = [path] if path.is_file() else [each for each in path.iterdir() if each.is_file()]
        return f"{path}, {size_of(sum(each.stat().st_size for each in files))} in its files"


def usable(memory: int) -> int:
    """Bytes of a device's memory that tensors may take."""
    return int(memory * (1 - RESERVED))


def size_of(count: float) -> str:
    """Bytes on a disk, in powers of 1000."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count:.0f} bytes"


class _Stub(nn.Module):
    """Stands in for a network and counts the images that it sees, by their width.

    Args:
        network: whose conditions it takes.
        counted: updated in place.
    """

    def __init__(self, network: nn.Module | Any, counted: Counter[int]) -> None:
        super().__init__()
        self.counted = counted
        for name in ("classes", "text_width", "text_length", "image_channels"):
            setattr(self, name, getattr(network, name, 0))
        own = getattr(network, "channels", 1)
        self.ratio = getattr(network, "out_channels", own) // own  # 2 with a learned variance

    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor | None) -> Tensor:
        self.counted[x.shape[-1]] += len(x)
        return x.new_zeros(len(x), self.ratio * x.shape[1], *x.shape[2:])


def network_calls(
    experiment: Config,
    objective: TrainingObjective,
    network: nn.Module,
    settings: TrainerConfig,
) -> Counter[int]:
    """Network evaluations of a sampled image, by side; the sampler runs around a network that
    gives zeros, and a guide counts as the network itself.

    Args:
        experiment: checked.
        objective: of the experiment.
        network: the raw F, of which only the conditions are looked at.
        settings: of the trainer.
    """
    evaluation = parts.with_defaults(experiment.tree["evaluation"])
    counted: Counter[int] = Counter()
    stub = _Stub(network, counted)
    denoiser = Denoiser(stub, objective.preconditioning)
    sampler = parts.sampler_of(experiment, objective)
    whole = config.build(experiment, "data.dataset").resolution
    side = whole if isinstance(sampler, PyramidSampler) else 1  # other samplers see no size
    given = conditions(stub, 1, (side, side), augmented=False, positioned=False)
    weight = evaluation["guidance"]
    low, high = map(float, evaluation["guidance_interval"])
    denoise = guided(
        denoiser,
        condition=given,
        weight=weight,
        kinds=removable(sizes(stub), settings.dropout),
        interval=(low, high),
        guide=denoiser if evaluation["guide"] is not None and not is_plain(weight) else None,
    )
    with torch.no_grad():
        sampler(denoise, torch.zeros(1, 1, side, side), torch.zeros_like)
    if side == whole:
        return counted
    return Counter({whole: counted[1]})


def _count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())
