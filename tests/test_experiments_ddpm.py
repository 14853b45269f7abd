"""The YAMLs of DDPM and improved DDPM hold the papers' numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion_pl import config
from diffusion_pl.commands import parts
from diffusion_pl.samplers.euler import euler
from diffusion_pl.training.lr_schedule import WarmupDecay

FOLDER = Path(__file__).parents[1] / "experiments"


def read(name):
    experiment = config.load(name, (), FOLDER)
    parts.bind(experiment)
    return experiment


@pytest.mark.parametrize(
    ("name", "steps", "hflip"),
    [
        ("lsun_bedroom_ddpm", 2_400_000, False),
        ("lsun_bedroom_large_ddpm", 1_150_000, False),
        ("lsun_cat_ddpm", 1_800_000, True),
        ("lsun_church_ddpm", 1_200_000, True),
        ("celebahq_ddpm", 500_000, True),
    ],
)
def test_the_large_images_are_trained_as_published(name, steps, hflip):
    # Ho 2020, App. B; warm-up and clipping as in the released code.
    experiment = read(name)
    published = {
        "data.batch_size": 64,
        "data.hflip": hflip,
        "network.dropout": 0.0,
        "optimizer.lr": 2e-5,
        "trainer.total_images": steps * 64,
        "lr_schedule.warmup": 5_000 * 64,
        "trainer.grad_clip": 1.0,
        "sampler.steps": 1000,
        "sampler.integrate.variance": "small",
        "objective.T": 1000,
    }
    assert {key: experiment.get(key) for key in published} == published
    assert config.build(experiment, "ema").decay(0, 64) == pytest.approx(0.9999, abs=1e-9)
    count = 255_677_955 if "large" in name else 113_673_219
    assert sum(p.numel() for p in parts.meta_network(experiment).parameters()) == count


def test_the_bound_differs_from_the_simple_loss_in_the_objective_alone():
    bound, simple = read("cifar10_ddpm_bound"), read("cifar10_ddpm")
    differing = {key for key in bound.tree if bound.tree[key] != simple.tree[key]}
    assert differing == {"objective"}
    assert bound.get("objective.variance") == bound.get("sampler.integrate.variance") == "large"


@pytest.mark.parametrize(
    ("name", "steps", "dropout"),
    [
        ("cifar10_improved_ddpm", 500_000, 0.3),
        ("cifar10_improved_ddpm_bound", 500_000, 0.3),
        ("cifar10_improved_ddpm_simple", 500_000, 0.3),
        ("cifar10_improved_ddpm_linear", 500_000, 0.3),
        ("cifar10_improved_ddpm_linear_simple", 500_000, 0.3),
        ("cifar10_improved_ddpm_linear_1000", 500_000, 0.3),
        ("imagenet64_improved_ddpm", 1_500_000, 0.0),
        ("imagenet64_improved_ddpm_bound", 1_500_000, 0.0),
    ],
)
def test_improved_ddpm_is_trained_as_published_and_sampled_on_its_own_table(name, steps, dropout):
    experiment = read(name)
    published = {
        "data.batch_size": 128,
        "network.model_channels": 128,
        "network.blocks": 3,
        "network.dropout": dropout,
        "optimizer.lr": 1e-4,
        "trainer.total_images": steps * 128,
        "objective.T": 1000 if "1000" in name else 4000,
    }
    assert {key: experiment.get(key) for key in published} == published
    assert config.build(experiment, "lr_schedule") == WarmupDecay()  # the same rate throughout
    assert config.build(experiment, "ema").decay(0, 128) == pytest.approx(0.9999, abs=1e-9)
    trained = config.build(experiment, "objective").preconditioning.timesteps
    sampler = config.build(experiment, "sampler")
    assert sampler.steps == trained.T
    torch.testing.assert_close(sampler.sigmas()[:-1], trained.sigmas().flip(0))
    learned = "simple" not in name and "1000" not in name
    assert experiment.get("network.learned_variance") == learned
    assert experiment.get("sampler.integrate.variance") == ("learned" if learned else "large")


def test_rectified_flow_is_sampled_in_equal_steps_of_time():
    sampler = config.build(read("cifar10_rectified_flow"), "sampler")
    sigmas = sampler.sigmas()
    t = sigmas / (1 + sigmas)
    assert t.diff().tolist() == pytest.approx([-0.009999] * 100)
    assert sampler.integrate.func is euler
