"""The parts of gpu.py; each takes the scale and gives its figures."""

from __future__ import annotations

import copy
import json
import platform
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_pl.data.cifar10 import CIFAR10
from diffusion_pl.data.dataset import DatasetSpec
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.evaluation import Evaluation, ImageGenerator, evaluate, reference_of
from diffusion_pl.images import from_bytes
from diffusion_pl.metrics import extractors, shapes
from diffusion_pl.metrics.fid import Frechet
from diffusion_pl.networks.adm import ADM
from diffusion_pl.networks.ddpm_unet import DDPMUNet
from diffusion_pl.networks.edm2_unet import EDM2UNet
from diffusion_pl.networks.jit import JiT
from diffusion_pl.networks.prx import PRX
from diffusion_pl.networks.routing import Routing
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.networks.uvit import UViT
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Sampler
from diffusion_pl.signals import StopRequest
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.compiling import compile_network
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.run import Experiment, fit
from diffusion_pl.training.settings import TrainerConfig

Figures = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Where and how much.

    Args:
        device: cuda or cpu.
        small: tiny networks and a step or two.
        seconds: until the part is stopped.
        out: file of the figures.
    """

    device: str
    small: bool
    seconds: float = 60.0
    out: Path | None = None

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def write(self, figures: Figures) -> None:
        """Keep what has been found so far."""
        if self.out is not None:
            self.out.write_text(json.dumps(figures))

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def time(self, call: Callable[[], object], repetitions: int = 5) -> float:
        """Median seconds of a call, after two for warming up."""
        times = []
        for turn in range(2 + repetitions if not self.small else 2):
            self.wait()
            started = time.perf_counter()
            call()
            self.wait()
            if turn >= (2 if not self.small else 1):
                times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]

    def memory(self) -> float | None:
        """Peak GiB since the last call; None on a CPU."""
        if not self.cuda:
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 2)


def environment(scale: Scale) -> Figures:
    """Versions, and what the device reaches."""
    side = 256 if scale.small else 8192
    figures: Figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if scale.cuda else platform.processor(),
    }
    for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        matrix = torch.randn(side, side, device=scale.device, dtype=kind)
        seconds = scale.time(partial(torch.mm, matrix, matrix), 20)
        figures[f"matrix product {name}, TFLOP/s"] = round(2 * side**3 / seconds / 1e12, 2)
    memory = torch.empty(2**20 if scale.small else 2**30, dtype=torch.uint8, device=scale.device)
    seconds = scale.time(memory.clone, 20)
    figures["copy, GB/s"] = round(2 * memory.numel() / seconds / 1e9, 1)
    if scale.cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        with suppress(OSError):
            said = subprocess.run(query, capture_output=True, text=True, check=False).stdout
            figures["driver, memory"] = said.strip()
    return figures


TINY: dict[str, Any] = {
    "model_channels": 32, "channel_mult": (1, 2), "blocks": 1, "attention": (8,),
}  # fmt: skip
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DDPM++": partial(SongUNet, 16, classes=5, dropout=0.0, **TINY),
    "NCSN++": partial(
        SongUNet, 16, classes=5, dropout=0.0, embedding="fourier", noise_mult=2,
        encoder="residual", resample_filter=(1, 3, 3, 1), **TINY,
    ),
    "ADM": partial(ADM, 16, classes=5, dropout=0.0, **TINY),
    "DDPM": partial(DDPMUNet, 16, classes=5, dropout=0.0, **TINY),
    "EDM2": partial(EDM2UNet, 16, classes=5, dropout=0.0, **TINY),
    "U-ViT": partial(
        UViT, 16, classes=5, model_channels=32, channel_mult=(1, 2), blocks=(1,), transformers=2,
        heads=4, dropout=0.0, embedding_channels=64,
    ),
    "JiT": partial(
        JiT, 16, classes=5, patch_size=4, width=64, depth=3, heads=4, bottleneck=16,
        class_tokens=2, class_tokens_from=1,
    ),
    "PRX": partial(
        PRX, 16, patch_size=4, width=64, depth=2, heads=4, bottleneck=32, text_width=16,
        text_length=3,
    ),
}  # fmt: skip


def woken(make: Callable[[], nn.Module]) -> nn.Module:
    """A network none of whose layers gives zero."""
    torch.manual_seed(0)
    network = make()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return network.eval()


def correctness(scale: Scale) -> Figures:
    """Relative error of each network beside the CPU's float32, in which networks embed levels."""
    figures: Figures = {}
    draw = torch.Generator().manual_seed(1)
    image = torch.randn(4, 3, 16, 16, generator=draw)
    level = torch.rand(4, generator=draw)
    for name, make in NETWORKS.items():
        network = woken(make)
        more = {"label": torch.arange(4)} if getattr(network, "classes", 0) else {}
        if name == "PRX":
            text = torch.randn(4, 3, 16, generator=draw)
            more = {"text": text, "text_mask": torch.ones(4, 3, dtype=torch.bool)}
        with torch.no_grad():
            truth = network(image, level, **more).double()
            network = network.to(scale.device)
            given = image.to(scale.device), level.to(scale.device)
            there = {key: value.to(scale.device) for key, value in more.items()}
            found = {"fp32": network(*given, **there)}
            with torch.autocast(scale.device, torch.bfloat16):
                found["bf16"] = network(*given, **there)
            if scale.cuda or name == "JiT":  # each costs seconds
                compile_network(network, "blocks" if name != "PRX" else True)
                found["fp32, compiled"] = network(*given, **there)
        figures[name] = {
            how: float(f"{_relative(output, truth):.2g}") for how, output in found.items()
        }
        scale.write(figures)
    return figures


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double().cpu() - truth).norm() / truth.norm())


def _experiment(scale: Scale, steps: int, precision: str, **settings: Any) -> Experiment:
    """A small run, with dropout and flips, of 8 images a step."""
    images = 8 * steps
    return Experiment(
        name="gpu",
        config={"experiment": "gpu"},
        seed=3,
        settings=TrainerConfig(
            total_images=images, checkpoint_every=images, log_every=8 * max(1, steps // 2),
            accelerator="auto" if scale.cuda else "cpu", precision=precision, loggers=(),
            **settings,
        ),
        data=DataConfig(Synthetic(40, 16), batch_size=8, hflip=True),
        network=SongUNet(16, classes=8, dropout=0.1, **TINY),
        objective=EDM(),
        optimizer=partial(torch.optim.Adam, lr=2e-3, fused=True),
        ema=EMA(half_life=100),
        sampler=Sampler(heun, Rho(), 2),
        extractor=shapes.load(),
        evaluation=Evaluation(every=10**9, count=2, grid=2),
    )  # fmt: skip


def _weights(made: Experiment, folder: Path) -> Figures:
    fit(made, folder, folder / "references", StopRequest())
    newest = checkpoints.latest(folder / "checkpoints")
    assert newest is not None
    return checkpoints.load(newest)


def resume(scale: Scale) -> Figures:
    """Whether a run that was resumed has the very weights of one that was not."""
    figures: Figures = {}
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    steps = 4 if scale.small else 24
    for precision in ("bf16", "fp16") if scale.cuda else ("fp32",):
        found = []
        for parts in ((steps,), (steps // 2, steps)):
            with tempfile.TemporaryDirectory() as folder:
                for part in parts:
                    torch.manual_seed(0)
                    saved = _weights(_experiment(scale, part, precision), Path(folder))
            found.append(saved)
        one, two = (each["state_dict"] for each in found)
        equal = all(torch.equal(value, two[key]) for key, value in one.items())
        figures[f"{precision}, the same bits"] = equal
        scaler = [str(each.get("MixedPrecision")) for each in found]
        if precision == "fp16":
            figures["fp16, the same loss scale"] = scaler[0] == scaler[1] != "None"
        scale.write(figures)
    return figures


WAITS = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize")


def syncs(scale: Scale) -> Figures:
    """Calls a step that wait for the device, from the difference of two lengths of run."""
    few, many = (2, 6) if scale.small else (10, 30)
    counts: dict[int, dict[str, int]] = {}
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if scale.cuda else []
    for steps in (few, few, many):  # the first warms up
        with tempfile.TemporaryDirectory() as folder:
            made = _experiment(scale, steps, "bf16" if scale.cuda else "fp32")
            made = replace(made, evaluation=Evaluation(every=10**9, count=1, grid=1))
            with torch.profiler.profile(activities=activities) as profile:
                fit(made, Path(folder), Path(folder) / "references", StopRequest())
        found = {event.key: event.count for event in profile.key_averages()}
        counts[steps] = {name: found.get(name, 0) for name in WAITS}
    return {
        f"{name}, a step": round((counts[many][name] - counts[few][name]) / (many - few), 2)
        for name in WAITS
    }


def _ddpmpp(scale: Scale) -> tuple[nn.Module, int]:
    """EDM's network for CIFAR-10 and its side, or a tiny one."""
    if scale.small:
        return SongUNet(16, dropout=0.0, **TINY), 16
    return SongUNet(32, augment=9, dropout=0.13), 32


def _train_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor, device: str
) -> None:
    objective = EDM()
    u = torch.rand(len(image), dtype=torch.float64, device=device)
    denoiser = objective.denoiser(network)
    with torch.autocast(device, torch.bfloat16):
        loss = objective.loss(denoiser, image, u, torch.randn_like(image)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _flops(network: nn.Module, side: int) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    device = next(network.parameters()).device
    image = torch.zeros(1, 3, side, side, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image, torch.zeros(1, device=device))
    return float(counter.get_total_flops())


def _peak(scale: Scale) -> float:
    side = 256 if scale.small else 8192
    matrix = torch.randn(side, side, device=scale.device, dtype=torch.bfloat16)
    return 2 * side**3 / scale.time(partial(torch.mm, matrix, matrix), 20)


def training(scale: Scale) -> Figures:
    """Images a second of a training step, and its share of the measured peak."""
    figures: Figures = {}
    peak = _peak(scale)
    for how in (False, "blocks", True):
        for batch in (4,) if scale.small else (256, 64, 512, 1024):
            if how is True and batch != 512 and not scale.small:
                continue
            network, side = _ddpmpp(scale)
            flops = 3 * _flops(network, side)
            network = network.to(scale.device, memory_format=torch.channels_last).train()
            if how and scale.small and not scale.cuda:
                continue  # a compiler's minute for a line that correctness has run
            compile_network(network, how)  # type: ignore[arg-type]
            optimizer = torch.optim.Adam(network.parameters(), fused=True)
            image = torch.randn(batch, 3, side, side, device=scale.device)
            image = image.to(memory_format=torch.channels_last)
            scale.memory()
            rate = batch / scale.time(partial(_train_step, network, optimizer, image, scale.device))
            name = f"{ {False: 'eager', True: 'whole'}.get(how, how) }, batch {batch}"
            figures[name] = {
                "images/s": round(rate, 1),
                "share of the measured bf16 peak": round(rate * flops / peak, 4),
                "GiB": scale.memory(),
            }
            scale.write(figures)
    return figures


def sampling(scale: Scale) -> Figures:
    """Images a second of 18 steps of Heun, 35 evaluations."""
    figures: Figures = {}
    batch = 4 if scale.small else 512
    modes: dict[str, str | None] = {"eager": None, "compiled": "default"}
    modes |= {"CUDA graphs": "reduce-overhead"} if scale.cuda else {}
    for name, mode in modes.items():
        network, side = _ddpmpp(scale)
        network = network.to(scale.device, memory_format=torch.channels_last).eval()
        if mode is not None:
            if scale.small and not scale.cuda:
                continue
            network.compile(mode=mode)
        denoiser = EDM().denoiser(network)
        sampler = Sampler(heun, Rho(), 2 if scale.small else 18)

        def draw(denoiser: Any = denoiser, sampler: Any = sampler, side: int = side) -> None:
            noise = torch.randn(batch, 3, side, side, device=scale.device, dtype=torch.float64)
            with torch.inference_mode(), torch.autocast(scale.device, torch.bfloat16):
                sampler(denoiser, noise, torch.randn_like)

        figures[f"{name}, batch {batch}, images/s"] = round(batch / scale.time(draw, 3), 2)
        scale.write(figures)
    return figures


def transformers(scale: Scale) -> Figures:
    """JiT-B/16 at 256 pixels and a U-ViT of as many FLOPs in training."""
    side, batch = (16, 2) if scale.small else (256, 128)
    jit: dict[str, Any] = {
        "classes": 1000, "patch_size": 16, "width": 768, "depth": 12, "heads": 12,
        "bottleneck": 128, "class_tokens": 32, "class_tokens_from": 4,
    }  # fmt: skip
    uvit: dict[str, Any] = {
        "classes": 1000, "model_channels": 64, "channel_mult": (1, 2, 12), "blocks": (1, 1),
        "halvings": 2, "transformers": 12, "heads": 12, "dropout": 0.0,
    }  # fmt: skip
    if scale.small:
        jit |= {"patch_size": 4, "width": 32, "depth": 4, "heads": 4, "bottleneck": 8}
        jit |= {"class_tokens": 2, "class_tokens_from": 1}
        uvit |= {"model_channels": 16, "channel_mult": (1, 2), "blocks": (1,), "halvings": 0}
        uvit |= {"transformers": 2, "heads": 4}
    routed = Routing(0.5, 1, 2) if scale.small else Routing(0.5)
    cases: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], bool]] = {
        "JiT-B/16": (JiT, jit, False),
        "JiT-B/16, compiled by block": (JiT, jit, True),
        "JiT-B/16, activation checkpointing": (
            JiT,
            jit | {"activation_checkpointing": True},
            False,
        ),
        "JiT-B/16, half of the tokens routed": (JiT, jit | {"routing": routed}, False),
        "U-ViT": (UViT, uvit, False),
        "U-ViT, compiled by block": (UViT, uvit, True),
    }
    figures: Figures = {}
    for name, (make, settings, compiled) in cases.items():
        if compiled and scale.small and not scale.cuda:
            continue
        network = make(side, **settings).to(scale.device).train()
        compile_network(network, "blocks" if compiled else False)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        image = torch.randn(batch, 3, side, side, device=scale.device)
        scale.memory()
        rate = batch / scale.time(partial(_train_step, network, optimizer, image, scale.device), 3)
        figures[name] = {"images/s": round(rate, 2), "batch": batch, "GiB": scale.memory()}
        scale.write(figures)
    return figures


def inception(scale: Scale) -> Figures:
    """Images a second of Inception, untrained: its speed does not depend on its weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from diffusion_pl.metrics.inception import Inception

    class Untrained(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Its constructor insists on a file."""

    figures: Figures = {}
    batch = 2 if scale.small else 256
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=scale.device)
    for precision in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            torch.save({}, Path(folder) / "none.pth")
            made = Untrained(
                "inception-v3-compat", ["2048", "logits_unbiased"],
                feature_extractor_weights_path=str(Path(folder) / "none.pth"),
            )  # fmt: skip
        extractor = Inception(made, "0" * 64, precision).to(scale.device)
        seconds = scale.time(partial(extractor, images), 3)
        figures[f"{precision}, images/s"] = round(batch / seconds, 1)
        scale.write(figures)
    return figures


def _race_data(scale: Scale) -> tuple[DatasetSpec, DatasetSpec]:
    """Images to train on and others to compare with."""
    archive = CIFAR10()
    if scale.small or not any(Path(archive.path).glob("*.tar.gz")):
        return Synthetic(200 if scale.small else 5000, 32), Synthetic(200, 32, seed=1)
    return archive, CIFAR10(split="test")


def race(scale: Scale) -> Figures:
    """As long each: our run, and a plain loop of the same network, objective and settings.

    Both have batches of 512 (64 on a CPU), Adam at 1e-3, an average of half-life 50,000 images with
    a ramp-up of 0.05, and autocast to bf16 where the device has it. Ours compiles by block.
    """
    each = 4.0 if scale.small else min(180.0, (scale.seconds - 60) / 2)
    data, others = _race_data(scale)
    figures: Figures = {"seconds each": round(each)}
    for name, train in (("ours", _ours), ("plain loop", _plain)):
        network, images = train(scale, data, each)
        figures[name] = {"images": images, "images/s": round(images / each, 1)}
        scale.write(figures)
        figures[name] |= _distances(scale, network, others)
        scale.write(figures)
    return figures


def _racer(scale: Scale) -> nn.Module:
    torch.manual_seed(0)
    return SongUNet(32, dropout=0.0, **TINY) if scale.small else SongUNet(32, dropout=0.13)


def _ours(scale: Scale, data: DatasetSpec, seconds: float) -> tuple[nn.Module, int]:
    made = replace(
        _experiment(
            scale, 10**7, "bf16" if scale.cuda else "fp32", compile=scale.cuda and "blocks"
        ),
        data=DataConfig(data, batch_size=512 if scale.cuda else 64, hflip=True),
        network=_racer(scale),
        optimizer=partial(torch.optim.Adam, lr=1e-3, fused=True),
        ema=EMA(half_life=50_000, ramp_up=0.05),
    )
    request = StopRequest()
    with tempfile.TemporaryDirectory() as folder:
        timer = threading.Timer(seconds, partial(setattr, request, "signal", signal.SIGTERM))
        timer.start()
        fit(made, Path(folder), Path(folder) / "references", request)
        newest = checkpoints.latest(Path(folder) / "checkpoints")
        assert newest is not None
        saved = checkpoints.load(newest)
    network, prefix = _racer(scale), "ema.network."
    state = saved["state_dict"]
    network.load_state_dict(
        {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    )
    return network, saved["global_step"] * made.data.batch_size


def _plain(scale: Scale, data: DatasetSpec, seconds: float) -> tuple[nn.Module, int]:
    images = data.open()
    pixels = images.read(torch.arange(len(images))).to(scale.device)
    network = _racer(scale).to(scale.device)
    average = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    batch, seen = 512 if scale.cuda else 64, 0
    denoiser, objective = EDM().denoiser(network), EDM()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        chosen = pixels[torch.randint(len(pixels), (batch,), device=scale.device)]
        flip = (torch.rand(batch, device=scale.device) < 0.5)[:, None, None, None]
        image = from_bytes(torch.where(flip, chosen.flip(-1), chosen))
        u = torch.rand(batch, dtype=torch.float64, device=scale.device)
        with torch.autocast(scale.device, torch.bfloat16, enabled=scale.cuda):
            loss = objective.loss(denoiser, image, u, torch.randn_like(image)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay = 0.5 ** (batch / min(50_000, max(0.05 * seen, 1e-8)))
        seen += batch
        with torch.no_grad():
            for mean, own in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(own, 1 - decay)
        if seen % (20 * batch) == 0:
            scale.wait()  # else the queue runs ahead of the clock
    return average, seen


def _distances(scale: Scale, network: nn.Module, others: DatasetSpec) -> Figures:
    """Fréchet distances of samples from images that were not trained on."""
    count = 32 if scale.small else 5000
    network = network.to(scale.device, memory_format=torch.channels_last).eval()
    generator = ImageGenerator(
        EDM().denoiser(network), Sampler(heun, Rho(), 2 if scale.small else 18), (3, 32, 32),
        precision=torch.bfloat16 if scale.cuda else None,
    )  # fmt: skip
    images = others.open()
    found: Figures = {}
    for name in ("shapes", "pixels"):
        extractor = extractors.load(name).to(scale.device)
        settings = Evaluation(
            every=1, count=count, metrics=(Frechet(),), batch_size=min(500, count)
        )
        with tempfile.TemporaryDirectory() as folder:
            reference = reference_of(
                images, settings, extractor, Path(folder), torch.device(scale.device)
            )
        rows, _ = evaluate(generator, settings, extractor, reference)
        found[rows[0]["name"]] = round(rows[0]["value"], 4)
    return found


# In the order of their worth; seconds at most.
PARTS: dict[str, tuple[Callable[[Scale], Figures], float]] = {
    "environment": (environment, 40),
    "correctness": (correctness, 75),
    "resume": (resume, 60),
    "syncs": (syncs, 40),
    "training": (training, 100),
    "sampling": (sampling, 60),
    "transformers": (transformers, 80),
    "inception": (inception, 25),
    "race": (race, 480),
}
