"""Every YAML in experiments/: it binds, builds, trains a step and samples a known distribution."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from analytic import Gaussian

from diffusion_pl import config
from diffusion_pl.commands import parts
from diffusion_pl.config import targets
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.samplers.pyramid import PyramidSampler
from diffusion_pl.training.module import DiffusionModule

FOLDER = Path(__file__).parents[1] / "experiments"
NAMES = sorted(config.experiments(FOLDER))
# What the networks call their widths, and their depths.
SMALL = {
    "model_channels": 8, "groups": 8, "embedding_channels": 16,
    "width": 16, "heads": 2, "bottleneck": 8, "class_tokens": 4, "class_tokens_from": 1,
}  # fmt: skip
SHALLOW = {"blocks", "transformers"}


def read(name, *overrides):
    experiment = config.load(name, overrides, FOLDER)
    parts.bind(experiment)
    return experiment


def test_there_are_experiments():
    assert {"quickstart", "cifar10_small", "cifar10_edm", "cifar10_ddpm"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_binds_and_its_first_line_states_the_published_number(name):
    read(name)
    first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert "no published number" in first or any(char.isdigit() for char in first)


@pytest.mark.parametrize("name", NAMES)
def test_its_network_builds_without_memory_and_takes_its_images(name):
    experiment = read(name)
    network = parts.meta_network(experiment)
    data = config.build(experiment, "data.dataset")
    assert all(parameter.is_meta for parameter in network.parameters())
    assert network.channels == data.channels
    network.check_resolution(data.resolution, data.resolution)


@pytest.mark.parametrize("name", NAMES)
def test_its_sampler_visits_levels_that_its_network_knows(name):
    experiment = read(name)
    parts.sampler_of(experiment, config.build(experiment, "objective"))


@pytest.mark.parametrize("name", NAMES)
def test_its_budget_divides_into_whole_batches_on_the_published_devices(name):
    experiment = read(name)
    settings = config.build(experiment, "trainer")
    batch_size = experiment.get("data.batch_size")
    assert settings.per_device_batch(batch_size, 1) > 0
    assert settings.per_device_batch(batch_size, 2) > 0
    assert settings.total_images % batch_size == 0


def shrink(node):
    """Give a network's section few channels and no more than two layers of a kind in a row.

    Levels, options and the resolution it is built for stay, and with them where attention is.
    """
    taken = inspect.signature(targets.locate(node["_target_"])).parameters
    for key in SMALL.keys() & taken.keys():
        if key != "heads" or "width" in taken:
            node[key] = min(node.get(key, SMALL[key]), SMALL[key])
    if "patch_size" in taken:  # four blocks, so that dropout has its middle half
        node |= {"depth": 4, "patch_size": min(node["patch_size"], 8)}
    for key in SHALLOW & node.keys():
        count = node[key]
        node[key] = min(count, 2) if isinstance(count, int) else [min(n, 2) for n in count]


def shrunken(experiment):
    """The experiment's network, made small."""
    shrink(experiment.tree["network"])
    return config.build(experiment, "network")


def smallest(network):
    """The smallest side from 16 pixels on that the network takes."""
    for side in (16, 32, 64, 128):
        with contextlib.suppress(ValueError):
            network.check_resolution(side, side)
            return side
    raise AssertionError("the network takes no small image")


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_a_training_step(name):
    experiment = read(name)
    torch.manual_seed(0)
    network = shrunken(experiment)
    # Layers that begin at zero keep all before them from moving in a first step.
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    side = smallest(network)
    words, width = torch.ones(4, 3, dtype=torch.bool), network.text_width
    if width:
        network.set_null_text(torch.randn(3, width), words[0])
    module = DiffusionModule(
        network,
        config.build(experiment, "objective"),
        config.build(experiment, "optimizer"),
        config.build(experiment, "ema"),
        config.build(experiment, "trainer"),
        batch_size=4,
        resolution=side,
        augment=config.build(experiment, "augment"),
    )
    optimizer = module.configure_optimizers()
    batch = {
        "image": torch.randint(0, 256, (4, network.channels, side, side), dtype=torch.uint8),
        "index": torch.arange(4),
        "label": torch.zeros(4, dtype=torch.long),
    }
    if width:
        batch |= {"text": torch.randn(4, 3, width).half(), "text_mask": words}
    # Those of the network, and of an objective that has weights of its own.
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:  # layers that begin at zero pass no gradient on
            parameter.add_(0.02 * torch.randn_like(parameter))
    before = [parameter.clone() for parameter in trained]
    sum(module.losses(batch)).backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, trained, strict=True)]
    assert sum(moved) > len(moved) / 2
    assert all(torch.isfinite(parameter).all() for parameter in trained)


@pytest.mark.parametrize("name", NAMES)
def test_its_sampler_draws_the_analytic_gaussian(name):
    sampler = config.build(read(name), "sampler")
    if isinstance(sampler, PyramidSampler):  # as high a pyramid of small images
        sampler = replace(sampler, levels=[level / sampler.levels[-1] for level in sampler.levels])
    else:
        sampler = replace(sampler, steps=min(sampler.steps, 1000))
    data = Gaussian(mean=0.1, std=0.3)

    def denoise(x, sigma, *, variance=False):
        mean = data.denoise(x, sigma)
        # A network that learned the variance would answer in between the two fixed ones.
        return torch.cat([mean, torch.zeros_like(mean)], dim=1) if variance else mean

    noise = ImageNoise(0, range(16))
    drawn = sampler(denoise, noise(torch.empty(16, 1, 16, 16)), noise)
    assert drawn.mean() == pytest.approx(0.1, abs=0.03)
    # 12 Heun steps end 6 % too wide on this Gaussian, DDPM's clipping a little too narrow.
    assert drawn.std() == pytest.approx(0.3, rel=0.12)


def test_the_papers_settings_are_the_published_ones():
    edm, ddpm = read("cifar10_edm"), read("cifar10_ddpm")
    published = [
        (edm, "data.batch_size", 512),
        (edm, "optimizer.lr", 1e-3),
        (edm, "trainer.total_images", 200_000_000),
        (edm, "lr_schedule.warmup", 10_000_000),
        (edm, "ema.half_life", 500_000),
        (edm, "network.dropout", 0.13),
        (edm, "augment.probability", 0.12),
        (edm, "sampler.steps", 18),
        (ddpm, "data.batch_size", 128),
        (ddpm, "optimizer.lr", 2e-4),
        (ddpm, "trainer.total_images", 800_000 * 128),
        (ddpm, "lr_schedule.warmup", 5_000 * 128),
        (ddpm, "trainer.grad_clip", 1.0),
        (ddpm, "network.dropout", 0.1),
        (ddpm, "sampler.steps", 1000),
        (ddpm, "data.hflip", True),
        (edm, "data.hflip", False),
    ]
    for experiment, key, value in published:
        assert experiment.get(key) == value, key
    count = {"cifar10_edm": 55_733_891, "cifar10_ddpm": 35_746_307}
    for experiment in (edm, ddpm):
        network = parts.meta_network(experiment)
        assert sum(p.numel() for p in network.parameters()) == count[experiment.name]
    assert config.build(ddpm, "ema").decay(0, 128) == pytest.approx(0.9999, abs=1e-9)
