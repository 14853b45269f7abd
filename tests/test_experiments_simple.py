"""The YAMLs of simple diffusion hold what is known of the paper's settings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from diffusion_pl import config
from diffusion_pl.commands import parts
from diffusion_pl.objectives.shifted_cosine import InterpolatedCosine, ShiftedCosine
from diffusion_pl.objectives.simple_diffusion import Multiscale

FOLDER = Path(__file__).parents[1] / "experiments"


def read(name):
    experiment = config.load(name, (), FOLDER)
    parts.bind(experiment)
    return experiment


@pytest.mark.parametrize("resolution", [128, 256, 512])
@pytest.mark.parametrize(
    ("network", "batch_size", "near"), [("unet", 512, 1.1149e9), ("uvit", 2048, 2.0283e9)]
)
def test_the_settings_are_the_known_ones(resolution, network, batch_size, near):
    experiment = read(f"imagenet{resolution}_simple_{network}")
    published = {
        "data.batch_size": batch_size,
        "data.dataset.resolution": resolution,
        "network.resolution": resolution,
        "network.classes": 1000,
        "optimizer.lr": 1e-4,
        "optimizer.betas": [0.9, 0.99],
        "optimizer.eps": 1e-12,
        "lr_schedule.warmup": 10_000 * batch_size,
        "trainer.grad_clip": 1.0,
        "sampler.steps": 512,
        "sampler.clip_denoised": True,
    }
    assert {key: experiment.get(key) for key in published} == published
    assert config.build(experiment, "ema").decay(0, batch_size) == pytest.approx(0.9999, abs=1e-9)
    built = parts.meta_network(experiment)
    assert sum(p.numel() for p in built.parameters()) == pytest.approx(near, rel=1e-4)
    # Whatever the image's size, the heavy level is 16 x 16.
    deepest = resolution // built.divisor
    assert deepest == (8 if network == "unet" else 16)


@pytest.mark.parametrize("network", ["unet", "uvit"])
def test_training_and_sampling_share_the_schedule_and_512_pixels_have_their_own(network):
    for resolution in (128, 256, 512):
        experiment = read(f"imagenet{resolution}_simple_{network}")
        objective, sampler = (config.build(experiment, part) for part in ("objective", "sampler"))
        large = resolution == 512
        wanted = InterpolatedCosine(512, 32, 256) if large else ShiftedCosine(resolution, 32)
        assert objective.schedule == sampler.schedule == wanted
        assert (objective.reduce == Multiscale()) is large
        # The levels visited are those of u = 512 / 512 to 1 / 512.
        last = wanted(torch.tensor(1 / 512, dtype=torch.float64))
        assert sampler.sigmas()[[0, -2]].tolist() == pytest.approx([math.exp(7.5), float(last)])
