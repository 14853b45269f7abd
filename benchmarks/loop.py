"""What a training step costs beyond the network: our run beside a bare PyTorch loop.

Both train the same two convolutions with the same objective on batches in memory. The bare loop
holds what no training can do without: noise, the forward and backward pass, fused Adam. Ours adds
the counted randomness, Lightning, the moving average, the log, the progress bar.
"""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import median, record
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.evaluation import Evaluation
from diffusion_pl.images import from_bytes
from diffusion_pl.metrics import shapes
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Sampler
from diffusion_pl.signals import StopRequest
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.run import Experiment, fit
from diffusion_pl.training.settings import TrainerConfig

BATCH = 8
STEPS = 500
ROUNDS = 5


class Tiny(nn.Module):
    """Two convolutions: small enough that the loop shows."""

    channels, classes = 3, 0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)
        )

    def check_resolution(self, height: int, width: int) -> None:
        """Takes any."""

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """The raw F, which here ignores the noise level."""
        output: Tensor = self.layers(x)
        return output


def network() -> Tiny:
    """The same weights every time."""
    torch.manual_seed(0)
    return Tiny().to(memory_format=torch.channels_last)


def bare(data: Synthetic) -> float:
    """Seconds a step of a plain loop."""
    images = data.dataset.open()
    objective, model = EDM(), network()
    denoiser = objective.denoiser(model)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3, fused=True)
    for step in range(STEPS + 50):
        if step == 50:
            started = time.perf_counter()
        image = from_bytes(images.read(torch.randint(0, len(images), (BATCH,))))
        u = torch.rand(BATCH, dtype=torch.float64)
        objective.loss(denoiser, image, u, torch.randn_like(image)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / STEPS


def ours(data: Synthetic) -> float:
    """Seconds a step of our run, from its own log; evaluation and checkpoints come after."""
    images = (STEPS + 50) * BATCH
    made = Experiment(
        name="loop",
        config={},
        seed=0,
        settings=TrainerConfig(
            total_images=images,
            checkpoint_every=images,
            log_every=50 * BATCH,
            accelerator="cpu",
            precision="fp32",
        ),
        data=data,
        network=network(),
        objective=EDM(),
        optimizer=partial(torch.optim.Adam, lr=1e-3, fused=True),
        ema=EMA(half_life=1000),
        sampler=Sampler(heun, Rho(), 2),
        extractor=shapes.load(),
        evaluation=Evaluation(every=images, count=2, grid=1),
    )
    with tempfile.TemporaryDirectory() as folder:
        fit(made, Path(folder), Path(folder) / "references", StopRequest())
        rows = (Path(folder) / "metrics.jsonl").read_text().splitlines()[1:]
    speeds = [json.loads(row)["images_per_second"] for row in rows if "loss" in row]
    return BATCH / median(speeds)


def main() -> None:
    """Measure in turns and record."""
    torch.set_num_threads(1)  # the network is too small for more, and the loop has one thread
    data = DataConfig(Synthetic(1000, 16), batch_size=BATCH)
    pairs = [(bare(data), ours(data)) for _ in range(ROUNDS)]
    plain, whole = (median([pair[side] for pair in pairs]) * 1e6 for side in (0, 1))
    beyond = median([(b - a) * 1e6 for a, b in pairs])
    record(
        "loop",
        {
            "batch": BATCH,
            "bare loop, us a step": round(plain),
            "our run, us a step": round(whole),
            "beyond the bare loop, us a step": round(beyond),
        },
    )


if __name__ == "__main__":
    main()
