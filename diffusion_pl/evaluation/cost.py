"""The time that an evaluation will take, estimated from a few images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusion_pl import ranks
from diffusion_pl.evaluation.generator import ImageGenerator
from diffusion_pl.evaluation.settings import Evaluation
from diffusion_pl.metrics.features import TILE, Extractor


@dataclass(frozen=True)
class Cost:
    """Estimated duration of one evaluation.

    Args:
        images: on the rank that has most.
        sampling: seconds to sample an image.
        features: seconds to extract the features of an image.
    """

    images: int
    sampling: float
    features: float

    @property
    def seconds(self) -> float:
        """Of the evaluation, without what the metrics compute at its end."""
        return self.images * (self.sampling + self.features)

    def __str__(self) -> str:
        whole = f"{self.seconds / 60:.0f} min" if self.seconds >= 120 else f"{self.seconds:.0f} s"
        return (
            f"about {whole} each here: {self.images:,} images a process, "
            f"{1e3 * self.sampling:.3g} ms to sample one, "
            f"{1e3 * self.features:.3g} ms to measure it"
        )


def estimate(generator: ImageGenerator, settings: Evaluation, extractor: Extractor) -> Cost:
    """Time one call of the network at every size that the sampler visits, and the extractor once.

    Args:
        generator: samples the images.
        settings: their number and the batch size.
        extractor: moved to the denoiser's device.
    """
    device = generator.device
    count = min(TILE, settings.batch_size, settings.count)
    asked = generator.condition(range(count))
    condition = {key: value.to(device) for key, value in asked.items()}
    sigma = torch.tensor(1.0, device=device)

    def seconds_at(side: int) -> float:
        height = generator.shape[1] * side // generator.shape[2]
        x = torch.zeros(count, generator.shape[0], height, side, device=device)
        with generator.inference():
            return _timed(lambda: generator.denoiser(x, sigma, **condition), device) / count

    drawn = sum(calls * seconds_at(side) for side, calls in generator.calls().items())
    extractor.to(device)
    bytes_seen = torch.zeros(count, *generator.shape, dtype=torch.uint8, device=device)
    seen = _timed(lambda: extractor(bytes_seen), device) / count if settings.metrics else 0.0
    return Cost(len(ranks.rank_range(settings.count, TILE)), drawn, seen)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second call; the first includes warm-up."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    return seconds
