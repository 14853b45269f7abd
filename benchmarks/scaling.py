"""How training grows with processes: measured on this machine's cores, simulated on a cluster.

The model is held against 1, 2, 4 and 8 processes here, more than the cores: from a step of one
process and the all-reduce of two it says what four and eight do. The same formula of a ring with a
cluster's figures, which are assumptions, gives the curve of docs/scaling.png. Beside it stands what
else grows: the agreement to stop, the sum of an evaluation's moments, checkpoints, the index of the
images.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import resource
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.data import grown, prepared, write_photos
from benchmarks.measure import RESULTS, median, record
from diffusion_pl import config, ranks
from diffusion_pl.data.order import Order
from diffusion_pl.data.shard_format import INDEX, MANIFEST, Manifest, index_bytes
from diffusion_pl.data.shards import Shards
from diffusion_pl.metrics.accumulated import Summed
from diffusion_pl.metrics.features import Features
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.ema import Updates, averaged_copy

PROCESSES = (1, 2, 4, 8)
ROUNDS = 5
STEPS = 4
BATCH = 2  # images of a process
SIDE = 8
DIMENSION = 2048  # of Inception's features

PLOT = Path(__file__).parents[1] / "docs" / "scaling.png"


# What is measured in a group of processes.


def timed(
    works: dict[str, Callable[[], object]], times: int = STEPS
) -> dict[str, tuple[float, float]]:
    """Median seconds on the clock and of this process's cores of each; they take turns.

    All processes begin each together; the first turn is left out.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for turn in range(times + 1):
        for name, work in works.items():
            distributed.barrier()
            started, used = time.perf_counter(), time.process_time()
            work()
            if turn:
                ended = time.perf_counter() - started, time.process_time() - used
                found[name].append(ended)
    return {
        name: (median([clock for clock, _ in each]), median([own for _, own in each]))
        for name, each in found.items()
    }


def member(rank: int, world: int, folder: str) -> None:
    """One process of a group: its medians, written by the first."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    denoiser = EDM().denoiser(SongUNet(SIDE, model_channels=64, blocks=1, attention=[4]))
    update = Updates(averaged_copy(denoiser), denoiser)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-4, fused=True)
    parallel = DistributedDataParallel(denoiser)
    gradient = torch.zeros(sum(p.numel() for p in denoiser.parameters()))

    def step(model: nn.Module) -> None:
        image = torch.randn(BATCH, 3, SIDE, SIDE)
        u = torch.rand(BATCH, dtype=torch.float64)
        EDM().loss(model, image, u, torch.randn_like(image)).mean().backward()
        optimizer.step()
        update(0.999)
        optimizer.zero_grad()

    works: dict[str, Callable[[], object]] = {"alone": lambda: step(denoiser)}
    if world > 1:
        works["together"] = lambda: step(parallel)
        works["all-reduce"] = lambda: distributed.all_reduce(gradient)
    times = timed(works) | timed({"agreement": lambda: ranks.all_agree(True)}, 20)
    found = {name: clock for name, (clock, _) in times.items()}
    found |= {f"{name}, own": own for name, (_, own) in times.items()}
    if world > 1:
        found["moments, MiB"] = moments()
    found["parameters"] = len(gradient)
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found))
    distributed.destroy_process_group()


def moments() -> float:
    """MiB more that the first process takes while an evaluation's moments are added up."""
    metric = Summed("pooled", torch.zeros(DIMENSION), lambda seen, kept: ({}, {}), keep=False)
    metric.update(Features(torch.randn(8, DIMENSION)))
    metric.sync()  # once, so that what torch sets up is there
    metric.unsync()
    gc.collect()
    before = now()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    metric.sync()
    return peak() - before


def now() -> float:
    """Resident MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak() -> float:
    """The most that was resident, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def group(world: int) -> dict[str, float]:
    """The medians of a group of processes."""
    # Forked: eight interpreters that import torch by themselves would take minutes here.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        members = [
            context.Process(target=member, args=(rank, world, folder)) for rank in range(world)
        ]
        for each in members:
            each.start()
        for each in members:
            each.join()
        found: dict[str, float] = json.loads(Path(folder, "found").read_text())
    return found


# The model.


@dataclass(frozen=True)
class Link:
    """What joins processes.

    Args:
        latency: seconds a message.
        bandwidth: bytes a second, of one process.
    """

    latency: float
    bandwidth: float

    def all_reduce(self, world: int, size: float) -> float:
        """Seconds of a ring: 2 (N - 1) messages of size / N each."""
        return 2 * (world - 1) * (self.latency + size / (world * self.bandwidth))


def crowded(turns: float, world: int, compute: float, link: Link, size: float) -> float:
    """Seconds a step of processes that take turns on this machine's cores.

    The ring's copies and sums are work of the same cores, so nothing overlaps.

    Args:
        turns: seconds on the clock for a second of a core; processes over cores, where nothing
            else runs.
        world: processes.
        compute: seconds of a core that a step takes.
        link: likewise in seconds of a core.
        size: bytes of the gradient.
    """
    return turns * (compute + link.all_reduce(world, size))


@dataclass(frozen=True)
class Model:
    """What the curve needs of an experiment.

    Args:
        batch: images of a step over all devices.
        passed: images of a micro-batch.
        parameters: of the network.
        flop: of a training step, an image; with recomputation if the experiment recomputes.
    """

    batch: int
    passed: int
    parameters: int
    flop: float


@dataclass(frozen=True)
class Cluster:
    """Assumptions, none of them measured here.

    Args:
        rate: FLOP a second that a device does in training.
        memory: bytes a second of its memory.
        overhead: least seconds of a micro-batch, to launch its kernels.
        devices: of a node.
        inside: joins the devices of a node.
        between: joins the nodes; the bandwidth is a whole node's.
        overlap: fraction of a micro-batch in which gradients are sent, its backward part.
        bucket: bytes that are sent at a time.
    """

    between: Link
    rate: float = 355e12
    memory: float = 3e12
    overhead: float = 7e-3
    devices: int = 8
    inside: Link = Link(10e-6, 300e9)
    overlap: float = 2 / 3
    bucket: float = 25 * 2**20

    def exchange(self, world: int, size: float) -> float:
        """Seconds to add gradients up: within the nodes, each part between them, and back."""
        inside = min(world, self.devices)
        nodes = -(-world // self.devices)
        return self.inside.all_reduce(inside, size) + self.between.all_reduce(nodes, size)

    def step(self, model: Model, world: int) -> float:
        """Seconds a step of data-parallel training; one exchange, during the last micro-batch."""
        images = model.batch / world
        micro_batches = -(-images // model.passed)
        compute = max(images * model.flop / self.rate, micro_batches * self.overhead)
        # Adam reads and writes 28 bytes a parameter, the moving average 12, and nobody shares it.
        update = 40 * model.parameters / self.memory
        size = 4 * model.parameters
        hidden = self.overlap * compute / micro_batches
        last = self.exchange(world, min(size, self.bucket)) if world > 1 else 0.0
        shown = max(self.exchange(world, size) - hidden, last) if world > 1 else 0.0
        return compute + update + shown


CLUSTERS = {
    "400 GB/s a node": Cluster(Link(20e-6, 400e9 * 0.7)),
    "12.5 GB/s a node": Cluster(Link(30e-6, 12.5e9 * 0.7)),
}
EXPERIMENTS = {
    "cifar10_edm": "DDPM++",
    "imagenet64_edm": "ADM",
    "imagenet512_simple_unet": "SimpleUNet",
    "imagenet512_simple_uvit": "UViT",
}
DEVICES = (1, 8, 16, 32, 64, 128, 256, 512, 1024)


def curves() -> dict[str, Any]:
    """Images a second over the devices, by cluster and experiment."""
    counted = json.loads(sorted(RESULTS.glob("memory-*.json"))[-1].read_text())["figures"]
    found: dict[str, Any] = {}
    for where, cluster in CLUSTERS.items():
        for name, network in EXPERIMENTS.items():
            experiment = config.load(name)
            recomputes = experiment.get("network").get("activation_checkpointing", False)
            figures = counted[network]["recomputed" if recomputes else "kept"]
            model = Model(
                experiment.get("data.batch_size"),
                experiment.get("trainer.device_batch_size"),
                figures["parameters"],
                figures["TFLOP an image"] * 1e12,
            )
            found.setdefault(where, {})[name] = {
                str(world): round(model.batch / cluster.step(model, world), 1)
                for world in DEVICES
                if model.batch % world == 0
            }
    return found


# What else grows.


def saving(folder: Path) -> list[dict[str, float]]:
    """Checkpoints of two sizes, as large as weights, average and Adam's moments."""
    found = []
    for mebibytes in (64, 512):
        state = {"state_dict": {str(i): torch.randn(2**20 * mebibytes // 32) for i in range(8)}}
        path = folder / "checkpoint.ckpt"
        times: dict[str, list[float]] = {"saved": [], "verified": []}
        for _ in range(ROUNDS):
            for name, work in (("saved", checkpoints.save), ("verified", None)):
                started = time.perf_counter()
                work(state, path) if work else checkpoints.verify(path)
                times[name].append(time.perf_counter() - started)
        size = path.stat().st_size
        rates = {f"{name}, MB/s": round(size / 1e6 / median(t)) for name, t in times.items()}
        found.append({"MB": round(size / 1e6), **rates})
    return found


def index(folder: Path) -> dict[str, Any]:
    """Bytes an image on the disk by resolutions; opened, in memory and for a moment."""
    source = write_photos(folder / "tiny", 2000, 16, "png")
    disk = {}
    for resolutions in ("16", "16,8", "16,8,4"):
        path = prepared(source, folder / resolutions, resolutions, "png", 500)
        assert index_bytes(Manifest.read(path)) == (path / INDEX).stat().st_size
        disk[f"{resolutions.count(',') + 1} resolutions, bytes an image"] = round(
            (path / INDEX).stat().st_size / 2000, 2
        )
    one = prepared(write_photos(folder / "eight", 1000, 8, "png"), folder / "one", "8", "raw", 1000)
    opened = []
    for count in (1000, 10_000):
        path = grown(one, folder / f"grown{count}", count)
        started = time.perf_counter()
        Shards(str(path), 8).open()
        seconds = time.perf_counter() - started
        tracemalloc.start()
        images = Shards(str(path), 8).open()
        stays, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        opened.append(
            {
                "images": len(images),
                "shards": count,
                "dataset.json, bytes a shard": round((path / MANIFEST).stat().st_size / count),
                "seconds": round(seconds, 2),
                "stays, bytes an image": round(stays / len(images), 2),
                "at most, bytes an image": round(most / len(images), 2),
            }
        )
    return {"on the disk": disk, "opened": opened, "order": order()}


def order() -> list[dict[str, Any]]:
    """Seconds to come to another window, of 1,024 shards of 1,000 images each or of all images."""
    found = []
    for shards, window in ((10_000, 1024), (1_000_000, 1024), (10_000, 0)):
        walk = Order(1000 * shards, 0, (1000,) * shards, window)
        walk(0, 64)
        times = []
        for number in range(1, ROUNDS + 1):
            first = number * (1024 * 1000 if window else walk.count)
            started = time.perf_counter()
            walk(first, first + 64)
            times.append(time.perf_counter() - started)
        found.append({"images": walk.count, "window": window, "seconds": round(median(times), 3)})
    return found


def draw(measured: dict[str, Any], projected: dict[str, Any]) -> None:
    """Measured beside predicted here, and efficiency on the assumed clusters."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (here, there) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    here.plot(PROCESSES, [measured[str(p)]["images/s"] for p in PROCESSES], "o", label="measured")
    predicted = [measured[str(p)]["predicted images/s"] for p in PROCESSES]
    here.plot(PROCESSES, predicted, "k--", label="predicted from 1 and 2 processes")
    here.set(xscale="log", xlabel="CPU processes", ylabel="images/s", ylim=(0, None))
    here.set_xticks(PROCESSES, map(str, PROCESSES))
    here.minorticks_off()
    here.set_title(f"measured: gloo on {os.cpu_count()} cores")
    for style, (where, experiments) in zip(("-", "--"), projected.items(), strict=True):
        for colour, (name, points) in enumerate(experiments.items()):
            worlds = [int(world) for world in points if int(world) >= 8]
            shares = [points[str(w)] / w / points["1"] for w in worlds]
            label = f"{name}" if style == "-" else None
            there.plot(worlds, shares, style, color=f"C{colour}", marker=".", label=label)
        there.plot([], [], f"k{style}", label=where)
    there.set(
        xscale="log", xlabel="GPUs, at the paper's batch", ylabel="efficiency", ylim=(0, 1.05)
    )
    there.set_xticks(DEVICES[1:], map(str, DEVICES[1:]))
    there.minorticks_off()
    there.set_title("simulated: an assumed cluster, not measured")
    for axes in (here, there):
        axes.grid(alpha=0.3)
    here.legend(fontsize=8, loc="lower left")
    there.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(PLOT, dpi=110)


def compared(groups: dict[int, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds; predictions from one process and the all-reduce of two."""
    found = {
        world: {key: median([each[key] for each in rounds]) for key in rounds[0]}
        for world, rounds in groups.items()
    }
    compute = found[1]["alone, own"]
    size = 4 * found[1]["parameters"]
    latency = found[2]["agreement, own"] / 2
    link = Link(latency, size / 2 / (found[2]["all-reduce, own"] / 2 - latency))
    result: dict[str, Any] = {
        "parameters": int(found[1]["parameters"]),
        "a core's own, ms a step": round(compute * 1e3, 1),
        "link": {"latency, us": round(latency * 1e6), "MB/s": round(link.bandwidth / 1e6)},
    }
    for world, each in found.items():
        key = "together" if world > 1 else "alone"
        # How crowded the cores were is seen in the steps that exchange nothing, of the same round.
        turns = [one["alone"] / one["alone, own"] for one in groups[world]]
        predicted = [crowded(each, world, compute, link, size) for each in turns]
        ratios = [p / one[key] for p, one in zip(predicted, groups[world], strict=True)]
        result[str(world)] = {
            "images/s": round(world * BATCH / each[key], 2),
            "predicted images/s": round(world * BATCH / median(predicted), 2),
            "measured / predicted": round(median(ratios), 2),
            "of each round": [round(ratio, 2) for ratio in ratios],
            "turns": round(median(turns), 2),
            "turns if nothing else ran": max(1.0, world / (os.cpu_count() or 1)),
            "step, ms": round(each[key] * 1e3, 1),
            "step without exchange, ms": round(each["alone"] * 1e3, 1),
        }
        if world > 1:
            ring = crowded(median(turns), world, 0.0, link, size)
            result[str(world)] |= {
                "all-reduce, ms": round(each["all-reduce"] * 1e3, 1),
                "predicted all-reduce, ms": round(ring * 1e3, 1),
                "agreement, us": round(each["agreement"] * 1e6),
                "moments, MiB more": round(each["moments, MiB"], 1),
            }
    return result


def main() -> None:
    """Measure in turns, compare, simulate, draw and record."""
    torch.set_num_threads(1)
    groups: dict[int, list[dict[str, float]]] = {world: [] for world in PROCESSES}
    for _ in range(ROUNDS):
        for world in PROCESSES:
            groups[world].append(group(world))
    measured = compared(groups)
    with tempfile.TemporaryDirectory(dir=".") as name:
        others = {"checkpoints": saving(Path(name)), "index": index(Path(name))}
    projected = curves()
    draw(measured, projected)
    record("scaling", {"here": measured, **others, "simulated images/s": projected})


if __name__ == "__main__":
    main()
