"""Features and distances beside torch-fidelity's and torchmetrics', on weights drawn at random.

Speeds do not need trained weights; errors are stated against float32 of torch-fidelity's network.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

from benchmarks.measure import interleaved, median, record
from diffusion_pl.metrics import inception
from diffusion_pl.metrics.accumulated import Summed
from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.fid import distance
from diffusion_pl.metrics.moments import Moments
from diffusion_pl.metrics.precision_recall import covered

BATCH = 32
ROWS = 50_000


def random_weights(path: Path) -> None:
    """Write weights of torch-fidelity's layout whose features differ from image to image."""
    torch.manual_seed(0)
    loaded, torch.load = torch.load, lambda *_, **__: {}  # its constructor insists on a file
    strict, FeatureExtractorInceptionV3.load_state_dict = (
        FeatureExtractorInceptionV3.load_state_dict,
        lambda *_: None,
    )
    try:
        network = FeatureExtractorInceptionV3("n", ["2048"], feature_extractor_weights_path="")
    finally:
        torch.load, FeatureExtractorInceptionV3.load_state_dict = loaded, strict
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    torch.save(network.state_dict(), path)


def features(repetitions: int, device: str) -> dict[str, Any]:
    """Images a second of Inception, ours beside torch-fidelity's, and how far they differ."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        random_weights(path)
        theirs = FeatureExtractorInceptionV3(
            "n", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
        ).to(device)
        ours = {kind: inception.load(str(path), kind).to(device) for kind in ("fp32", "bf16")}
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, device=device)

    def run(call: Callable[[Tensor], Any]) -> Callable[[], None]:
        def once() -> None:
            with torch.inference_mode():
                call(images)
            if device == "cuda":
                torch.cuda.synchronize()

        return once

    def in_bf16(batch: Tensor) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return theirs(batch)

    cases = {
        "torch-fidelity fp32": run(theirs),
        "torch-fidelity bf16": run(in_bf16),
        "ours fp32": run(ours["fp32"]),
        "ours bf16": run(ours["bf16"]),
    }
    seconds = {name: median(times) for name, times in interleaved(cases, repetitions).items()}
    exact = theirs(images)[0]

    def error(found: Tensor) -> float:
        return ((found - exact).square().mean() / exact.square().mean()).sqrt().item()

    reference = seconds["torch-fidelity fp32"]
    return {
        "images/s": {name: round(BATCH / value, 2) for name, value in seconds.items()},
        "times torch-fidelity fp32": {
            name: round(reference / value, 2) for name, value in seconds.items()
        },
        "error, root mean square": {
            "torch-fidelity bf16": error(in_bf16(images)[0]),
            "ours fp32": error(ours["fp32"](images).pooled),
            "ours bf16": error(ours["bf16"](images).pooled),
        },
    }


def normal_moments(count: int, seed: int) -> Moments:
    """Moments of correlated features."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(2048, 2048, generator=generator, dtype=torch.float64) / 2048**0.5
    x = torch.randn(count, 2048, generator=generator, dtype=torch.float64) @ mix
    return Moments(x.mean(dim=0), x.T.cov(), count)


def frechet(repetitions: int) -> dict[str, Any]:
    """The distance from moments of 2,048 features; the reference's factor is at hand, as in use."""
    result = {}
    one = normal_moments(4096, 0)
    started = time.perf_counter()
    assert one.factor.shape == (2048, 2048)
    result["factor, once, s"] = round(time.perf_counter() - started, 2)
    for name, count in (("4,096 images", 4096), ("1,000 images", 1000)):
        other = normal_moments(count, 1)
        cases = {
            "ours": lambda other=other: distance(one, other),
            "torchmetrics": lambda other=other: _compute_fid(
                one.mean, one.covariance, other.mean, other.covariance
            ),
        }
        seconds = {key: median(times) for key, times in interleaved(cases, repetitions).items()}
        theirs = cases["torchmetrics"]().item()
        result[name] = {
            **{f"{key}, s": round(value, 3) for key, value in seconds.items()},
            "times torchmetrics": round(seconds["torchmetrics"] / seconds["ours"], 2),
            "difference": abs(cases["ours"]() - theirs),
        }
    return result


class _Passed(nn.Module):
    """torchmetrics wants a network; this one hands the features through."""

    num_features = 2048

    def forward(self, x: Tensor) -> Tensor:
        return x


def sums(repetitions: int) -> dict[str, Any]:
    """Moments of 50,000 x 2,048 features that come 64 at a time."""
    batches = torch.randn(ROWS, 2048).split(64)

    def ours() -> None:
        metric = Summed("pooled", torch.zeros(2048, dtype=torch.float64), _nothing, keep=False)
        for batch in batches:
            metric.update(Features(batch))
        metric.compute()

    def theirs() -> None:
        metric = FrechetInceptionDistance(feature=_Passed()).set_dtype(torch.float64)
        for batch in batches:
            metric.update(batch.double(), real=False)

    seconds = {
        key: median(times)
        for key, times in interleaved(
            {"ours": ours, "torchmetrics": theirs}, repetitions, warm_ups=0
        ).items()
    }
    return {
        **{f"{key}, s": round(value, 2) for key, value in seconds.items()},
        "times torchmetrics": round(seconds["torchmetrics"] / seconds["ours"], 2),
        "ours, MiB more at the peak": round(peak(ours), 1),
    }


def _nothing(moments: Moments, features: Tensor | None) -> tuple[dict[str, float], dict[str, Any]]:
    return {}, {}


def neighbours() -> dict[str, Any]:
    """Precision at 10,000 x 10,000 features of 2,048, without the matrix of their distances."""
    one, other = (torch.randn(10_000, 2048, dtype=torch.float64) for _ in range(2))
    started = time.perf_counter()
    more = peak(lambda: covered(one, other, 3))
    return {
        "s": round(time.perf_counter() - started, 1),
        "MiB more at the peak": round(more, 1),
        "the matrix would take, MiB": round(10_000**2 * 8 / 2**20),
    }


def peak(call: Callable[[], object]) -> float:
    """MiB of resident memory that a call adds at its peak, looked at every millisecond."""
    page = resource.getpagesize() / 2**20
    most, done = 0.0, threading.Event()

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, resident())
            time.sleep(0.001)

    call()  # what stays for good is there before
    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(0.0, most - before)


def main() -> None:
    """Measure and record."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repetitions", type=int, default=5)
    chosen = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record(
        "metrics",
        {
            "device": device,
            "Inception, 32 px": features(chosen.repetitions, device),
            "Frechet distance": frechet(chosen.repetitions),
            "moments of 50,000 x 2,048": sums(chosen.repetitions),
            "precision at 10,000": neighbours(),
        },
    )


if __name__ == "__main__":
    main()
