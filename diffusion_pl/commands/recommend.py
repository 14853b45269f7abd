"""What to train on a prepared data set on this machine: network, budget, time and command.

The rules, whose numbers are conventions:
    budget    400 passes over the data (published runs take 2,000 to 4,000 of large sets, with weeks
              of GPUs), no more than fits in an hour of CPUs or half a day of a GPU, at least 20,000
              images
    network   the published experiment of the size where a GPU meets 10,000 images or more; else the
              small EDM U-Net of `cifar10_small`: 16 channels on CPUs, 32 on a GPU, 64 from 2,000
              images on
    time      3 forward passes' operations an image, by a matrix product timed on this machine, of
              whose speed training reaches a share: two fifths on CPUs (measured: 0.4 to 0.5 of one
              core's), a seventh on GPUs (an assumption)
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_pl import config
from diffusion_pl.commands.hints import command
from diffusion_pl.data.recipe import Recipe
from diffusion_pl.data.shard_format import Manifest
from diffusion_pl.data.stored import Encoding
from diffusion_pl.names import shown

SMALL = "cifar10_small"

# By the largest side that they train at: the experiments for unlabelled and labelled images.
EXPERIMENTS = {
    32: ("cifar10_edm", "cifar10_edm_f_vp_cond"),
    64: ("ffhq64_edm", "imagenet64_edm"),
    128: ("imagenet128_simple_unet", "imagenet128_simple_unet"),
    256: ("imagenet256_simple_unet", "imagenet256_simple_unet"),
    512: ("imagenet512_simple_unet", "imagenet512_simple_unet"),
}
DIVISORS = {32: 4, 64: 8, 128: 32, 256: 32, 512: 32}  # of the side, as their networks halve it
# Experiments for several sizes on a GPU, by the divisor of their sides.
PYRAMIDS = {32: "pyramidal_256", 4: "pyramidal_small"}

LARGE = 10_000  # images from which a published experiment is recommended
EPOCHS = 400
MIN_IMAGES = 20_000
TIME_BUDGET = {"cpu": 3600.0, "gpu": 12 * 3600.0}
UTILIZATION = {"cpu": 0.55, "gpu": 1 / 7}
STEP_SECONDS = 0.025  # seconds of a step beside its matrix products
_MATRIX, _PRODUCTS = 64, 40

TEXT_GUIDANCE = 3.0  # of evaluations; docs/text.md

BATCH_SIZE = 256  # where the experiment is not found
_SMALL_BATCH = {"cpu": 16, "gpu": 32}  # small ones keep a GPU waiting
_BLOCKS = 1
_MOST_CORES = 4
_LOWEST = 32  # pixels a side of the network's lowest level, at most
_CPU_SIDE = 64  # pixels a side that CPUs can train at in about an hour
_LONG_SECONDS = 4 * 3600.0


@dataclass(frozen=True)
class Machine:
    """The hardware.

    Args:
        kind: cpu or gpu.
        name: for messages.
        cores: CPU cores that this process may use.
        speed: of a matrix product, FLOP/s.
    """

    kind: str
    name: str
    cores: int
    speed: float


@dataclass(frozen=True)
class Plan:
    """A recommendation.

    Args:
        experiment: its name.
        overrides: for this data.
        images: budget of the run.
        seconds: estimated time; None where it cannot be estimated.
        command: to type.
        lines: the explanation.
    """

    experiment: str
    overrides: list[str]
    images: int
    seconds: float | None
    command: str
    lines: list[str]


def machine() -> Machine:
    """This machine; times a matrix product for some hundredths of a second."""
    cores = len(os.sched_getaffinity(0))
    if any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
        import torch  # slow to import, so only where there may be a GPU

        if torch.cuda.is_available():
            return Machine("gpu", torch.cuda.get_device_name(), cores, _gpu_speed())
    speed = _core_speed() * min(cores, _MOST_CORES)
    return Machine("cpu", f"{cores} CPU {'core' if cores == 1 else 'cores'}", cores, speed)


def _core_speed() -> float:
    """FLOP/s of one core, in process time, which other programs do not affect."""
    matrix = np.ones((_MATRIX, _MATRIX), np.float32)  # so small that one thread multiplies it
    product = np.empty_like(matrix)
    times = []
    for _ in range(8):
        began = time.process_time()
        for _ in range(_PRODUCTS):
            np.matmul(matrix, matrix, out=product)
        times.append(time.process_time() - began)
    return float(2 * _MATRIX**3 * _PRODUCTS / max(min(times), 1e-9))


def _gpu_speed() -> float:
    """FLOP/s of a GPU for a matrix product in bfloat16."""
    import torch

    matrix = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.perf_counter()
        matrix @ matrix
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return float(2 * len(matrix) ** 3 / min(times))


def plan(manifest: Manifest, folder: Path, on: Machine, encoding: Encoding | None = None) -> Plan:
    """The recommendation for a prepared data set in a folder.

    Args:
        manifest: of the data set.
        folder: of the data set.
        on: the hardware.
        encoding: of its captions, to train on; None: without text.
    """
    found = _without_text(manifest, folder, on)
    if encoding is None or not found.overrides:
        return found
    overrides = [*found.overrides, *_text(encoding, manifest.classes > 0)]
    line = (
        f"with its captions by {shown(encoding.encoder)}, each dropped in a tenth of the images "
        "for guidance; what the text adds to the time is not estimated"
    )
    return replace(
        found,
        overrides=overrides,
        command=_command(found.experiment, folder, overrides),
        lines=[*found.lines, line],
    )


def _text(encoding: Encoding, labelled: bool) -> list[str]:
    """The settings that train on captions, and guide by them in evaluations."""
    dropout = "{label: 0.1, text: 0.1}" if labelled else "{label: 0.0, text: 0.1}"
    return [
        f"data.dataset.text={encoding.encoder}",
        f"network.text_width={encoding.width}",
        f"network.text_length={encoding.length}",
        f"trainer.dropout={dropout}",
        f"evaluation.guidance={TEXT_GUIDANCE}",
    ]


def _without_text(manifest: Manifest, folder: Path, on: Machine) -> Plan:
    """The recommendation for images and labels."""
    sides = manifest.resolutions
    divisors = [d for d in PYRAMIDS if all(side % d == 0 for side in sides)]
    if on.kind == "gpu" and len(sides) > 1 and divisors:
        name = PYRAMIDS[divisors[0]]
        return _published(manifest, folder, on, name, sides[0], _levels(sides))
    fitting = [known for known in EXPERIMENTS if known <= sides[0]]
    tier = max(fitting, default=min(EXPERIMENTS))
    if on.kind == "gpu" and manifest.count >= LARGE and sides[0] % DIVISORS[tier] == 0:
        name = EXPERIMENTS[tier][manifest.classes > 0]
        return _published(manifest, folder, on, name, sides[0], [])
    return small(manifest, folder, on)


def _levels(sides: Sequence[int]) -> list[str]:
    weights = ", ".join(f"{side}: 1" for side in sides)
    return [
        "data.dataset.made_of=null",
        f"data.resolution_weights={{{weights}}}",
        f"sampler.levels={sorted(sides)}",
    ]


def _published(
    manifest: Manifest, folder: Path, on: Machine, name: str, side: int, more: list[str]
) -> Plan:
    """A published experiment, its budget limited by the number of epochs."""
    try:
        tree = config.load(name)
        batch_size, images = int(tree.get("data.batch_size")), int(tree.get("trainer.total_images"))
        if not manifest.classes and tree.tree["trainer"].get("dropout", {}).get("label"):
            more = [*more, "trainer.dropout.label=0"]
    except config.ConfigError:  # there are no experiments here
        batch_size, images = BATCH_SIZE, 0
    batch_size = _fitting_batch(batch_size, manifest.count)
    budget = max(MIN_IMAGES, 10 * EPOCHS * manifest.count)
    overrides = [*_data(manifest, folder, side, batch_size), *more]
    if budget < images:
        images = budget
        overrides += [f"trainer.total_images={images}"]
    work = _counted(name, overrides, side)
    seconds = work and images * 3 * work / (on.speed * UTILIZATION[on.kind])
    how_long = (
        f"about {duration(seconds)} (estimated from a matrix product "
        "timed just now and an assumed utilization; it may be three times as long, or a third)"
        if seconds
        else "the run itself shows how long it takes"
    )
    lines = [
        f"for {manifest.count:,} images of {side} px and {on.name}: {name}, {images:,} images "
        f"seen, {how_long}"
    ]
    return Plan(name, overrides, images, seconds, _command(name, folder, overrides), lines)


def _counted(name: str, overrides: Sequence[str], side: int) -> float | None:
    """FLOP of a forward pass of an experiment's network; None where it cannot be built."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from diffusion_pl.commands import parts

    try:
        network: Any = parts.meta_network(parts.read(name, overrides))
    except ValueError:
        return None
    image = torch.zeros(1, network.channels, side, side, device="meta")
    zero = torch.zeros(1, device="meta")
    more = {"label": zero.long()} if network.classes else {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image, zero, **more)
    return float(counter.get_total_flops())


def small(manifest: Manifest, folder: Path, on: Machine) -> Plan:
    """The small network, as deep as the side allows, for a time that suits the machine."""
    count = manifest.count
    side = _side(manifest, on)
    mults = _channel_mult(side)
    channels = 16 if on.kind == "cpu" else 32 if count < 2000 else 64
    lowest = side >> (len(mults) - 1)
    if lowest > _LOWEST:
        whole = max(8, side - side % 8)
        line = (
            f"no network suits {side} px, which can be halved only {len(mults) - 1} times, to "
            f"{lowest} px: prepare the images at {whole} px first"
        )
        return Plan(SMALL, [], 0, None, _prepare_at(manifest, folder, whole), [line])
    batch_size = _fitting_batch(_SMALL_BATCH[on.kind], count)
    rate = _rate(on, side, channels, batch_size)
    images = max(MIN_IMAGES, min(EPOCHS * count, int(rate * TIME_BUDGET[on.kind])))
    images -= images % 1000
    seconds = images / rate
    overrides = [
        *_data(manifest, folder, side, batch_size),
        f"network.model_channels={channels}",
        f"network.channel_mult={mults}",
        f"network.attention={[lowest] if lowest <= 16 else []}",
        *of_budget(images, count),
    ]
    overrides += ["trainer.accelerator=auto"] if on.kind == "gpu" else []
    lines = [
        f"for {count:,} images of {side} px and {on.name}: a U-Net of {channels} channels, "
        f"{images:,} images seen ({images // count:,} times each), about {duration(seconds)} "
        f"where nothing else runs (estimated from a matrix product timed just now; it may be "
        "twice as long, or half)"
    ]
    if on.kind == "cpu" and side > _CPU_SIDE and seconds > _LONG_SECONDS:
        low = next((s for s in sorted(manifest.resolutions) if s <= _CPU_SIDE), _CPU_SIDE)
        fewer = MIN_IMAGES / _rate(on, low, channels, batch_size)
        lines.append(
            f"that is long without a GPU: at {low} px as many images take about {duration(fewer)}; "
            f"prepare them by: {_prepare_at(manifest, folder, low)}"
        )
    return Plan(SMALL, overrides, images, seconds, _command(SMALL, folder, overrides), lines)


def of_budget(images: int, count: int) -> list[str]:
    """The settings of the small experiment that go with its budget.

    Args:
        images: seen in training.
        count: of the data set.
    """
    return [
        f"trainer.total_images={images}",
        f"trainer.checkpoint_every={images // 8}",
        f"trainer.log_every={images // 40}",
        f"evaluation.every={images // 4}",
        f"evaluation.count={min(500, count)}",
        f"ema.half_life={images // 12}",
        f"lr_schedule.cooldown={images * 3 // 4}",
    ]


def _rate(on: Machine, side: int, channels: int, batch_size: int) -> float:
    """Images per second in training."""
    image = 3 * operations(side, channels, _channel_mult(side)) / (on.speed * UTILIZATION[on.kind])
    return 1 / (image + STEP_SECONDS / batch_size)


def _side(manifest: Manifest, on: Machine) -> int:
    """The size to train at; of several, CPUs take the smallest from 16 pixels."""
    if on.kind == "gpu" or len(manifest.resolutions) == 1:
        return manifest.resolutions[0]
    return min((s for s in manifest.resolutions if s >= 16), default=manifest.resolutions[0])


def _channel_mult(side: int) -> list[int]:
    """Channel multipliers of the levels, halving down to about 8 pixels."""
    levels = 1
    while side % 2**levels == 0 and side >> levels >= 8:
        levels += 1
    return [1] * (levels - 2) + [2, 4] if levels > 2 else [1, 2][-levels:]


def operations(side: int, channels: int, mults: Sequence[int]) -> float:
    """FLOP of a forward pass of the small U-Net's convolutions.

    Args:
        side: pixels.
        channels: of the first level.
        mults: channel multipliers of the levels.
    """

    def block(pixels: int, before: int, after: int) -> int:
        beside = before * after if before != after else 0
        return 2 * pixels * (9 * (before + after) * after + beside)

    sizes = [(side >> level) ** 2 for level in range(len(mults))]
    wide = [channels * each for each in mults]
    total = 2 * 9 * 2 * 3 * channels * sizes[0]  # first and last convolution, 3 channels
    width, skips = channels, [channels]
    for level, (wanted, pixels) in enumerate(zip(wide, sizes, strict=True)):
        if level:
            total += block(pixels, width, width)
            skips.append(width)
        for _ in range(_BLOCKS):
            total += block(pixels, width, wanted)
            width = wanted
            skips.append(width)
    total += 2 * block(sizes[-1], width, width)
    for level in reversed(range(len(wide))):
        for _ in range(_BLOCKS + 1):
            total += block(sizes[level], width + skips.pop(), wide[level])
            width = wide[level]
        if level:
            total += block(sizes[level - 1], width, width)
    return float(total)


def _fitting_batch(batch_size: int, count: int) -> int:
    while batch_size > count:
        batch_size //= 2
    return max(1, batch_size)


def _data(manifest: Manifest, folder: Path, side: int, batch_size: int) -> list[str]:
    channels = manifest.channels
    also = (
        [f"data.dataset.channels={channels}", f"network.channels={channels}"]
        if channels != 3
        else []
    )
    return [
        "data.dataset._target_=diffusion_pl.data.shards.Shards",
        f"data.dataset.path={folder}",
        f"data.dataset.resolution={side}",
        f"data.batch_size={batch_size}",
        "data.hflip=false",
        f"network.resolution={side}",
        f"network.classes={manifest.classes}",
        *also,
    ]


def _command(experiment: str, folder: Path, overrides: Sequence[str]) -> str:
    return command("train", experiment, "--run", f"runs/{folder.resolve().name}", *overrides)


def with_labels(manifest: Manifest, folder: Path) -> str:
    """The command that prepares the same images with folders as classes."""
    sides = ",".join(map(str, manifest.resolutions))
    return _prepare(manifest, f"{folder}-labelled", sides, labels=True)


def _prepare_at(manifest: Manifest, folder: Path, side: int) -> str:
    """The command that prepares the same images at another size."""
    return _prepare(manifest, f"{folder}-{side}", str(side), manifest.source.get("labels"))


def _prepare(manifest: Manifest, folder: str, sides: str, labels: bool | None) -> str:
    source = manifest.source
    words = [str(source["path"]), folder, "--resolutions", sides]
    words += [] if labels is None else ["--labels" if labels else "--no-labels"]
    if source.get("captions") is not None:
        words.append("--captions" if source["captions"] else "--no-captions")
    for name in ("count", "seed", "split", "image", "label", "caption"):
        if source.get(name) is not None:
            words += [f"--{name}", str(source[name])]
    for name in ("filter", "fit", "encoding", "channels", "shard_images"):
        value = getattr(manifest, name)
        if value not in ("drawn", getattr(Recipe, name)):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return command("prepare", *words)


def duration(seconds: float) -> str:
    """A time for people, such as `12 minutes`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    if seconds < 5400:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"
