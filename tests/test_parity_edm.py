"""EDM's family against reference outputs: networks, preconditionings, losses, trajectories."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from published import Fixture, edm_denoiser

from diffusion_pl import config as configs
from diffusion_pl.config import Config
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.interop import edm
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.objectives.edm_iddpm import IDDPM, nearest
from diffusion_pl.objectives.ve import VE
from diffusion_pl.objectives.vp import VP
from diffusion_pl.samplers.heun import heun

OBJECTIVES = {
    "edm_ddpmpp": EDM(),
    "vp_ddpmpp_cond": VP(),
    "ve_ncsnpp": VE(),
    "iddpm_adm": IDDPM(),
    "edm_adm_cond": EDM(),
}
NAMES = pytest.mark.parametrize("name", OBJECTIVES)


@pytest.fixture(scope="module")
def built():
    """Networks are built once."""
    return {}


@pytest.fixture
def model(parity, built):
    def make(name):
        if name not in built:
            fixture = Fixture(parity / f"{name}.npz")
            built[name] = fixture, edm_denoiser(fixture)
        return built[name]

    return make


def relative(got, expected):
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def condition(fixture, count=3):
    """What the network is told of the fixture's images; of the sampled ones, no augmentation."""
    told = {}
    if "class_labels" in fixture.arrays:
        told["label"] = fixture["class_labels"][:count].argmax(dim=1)
    if "augment_labels" in fixture.arrays and count == 3:
        told["augment"] = fixture["augment_labels"]
    return told


@NAMES
@torch.no_grad()
def test_networks_are_the_published_ones(model, name):
    fixture, denoiser = model(name)
    raw = denoiser.network(fixture["x"], fixture["c_noise"], **condition(fixture))
    assert relative(raw, fixture["out/raw_output"]) < 1e-5


@NAMES
@torch.no_grad()
def test_denoisers_are_the_published_ones(model, name):
    fixture, denoiser = model(name)
    sigma, told = fixture["sigma"], condition(fixture)
    level = sigma.reshape(-1, 1, 1, 1)
    denoised = denoiser(fixture["x"] * level, sigma, **told)
    assert relative(denoised, fixture["out/denoised_x"]) < 1e-5
    denoised = denoiser(fixture["y"] + fixture["noise"] * level, sigma, **told)
    assert relative(denoised, fixture["out/denoised_yn"]) < 1e-5


@NAMES
def test_the_network_is_told_the_published_noise_label(model, name):
    fixture, denoiser = model(name)
    told = denoiser.preconditioning(fixture["sigma"].double()).c_noise
    # The reference rounds 1 + sigma^2 to float32, which at sigma = 0.02 costs VP's time 1e-4.
    torch.testing.assert_close(told, fixture["c_noise"].double(), rtol=2e-4, atol=1e-6)


@NAMES
@torch.no_grad()
def test_losses_are_the_published_ones(model, name):
    fixture, denoiser = model(name)
    # Levels in place of quantiles, and every pixel's own error.
    objective = replace(OBJECTIVES[name], schedule=lambda sigma: sigma, reduce=torch.square)
    ours = denoiser.preconditioning
    # With the reference's rounding of c_noise, see above: it moves VP's loss by 1.1e-5.
    denoiser = Denoiser(denoiser.network, lambda s: ours(s)._replace(c_noise=fixture["c_noise"]))
    loss = objective.loss(
        denoiser, fixture["y"], fixture["sigma"], fixture["noise"], **condition(fixture)
    )
    assert relative(loss, fixture["out/weighted_sq_error"]) < 1e-5


def sampler_of(fixture, steps):
    """The model's own sampler, with fewer steps."""
    tree = edm.nodes(fixture.config)
    return replace(configs.build(Config("", "", tree), "sampler"), steps=steps)


@NAMES
@pytest.mark.parametrize("steps", [8, 18])
@torch.no_grad()
def test_heun_ends_where_the_published_sampler_does(model, name, steps):
    fixture, denoiser = model(name)
    sampler = sampler_of(fixture, steps)
    denoise = partial(denoiser, **condition(fixture, count=2))
    end = sampler(denoise, fixture["latents"], torch.zeros_like)
    assert relative(end, fixture[f"out/heun_{steps}"]) < 1e-4


@NAMES
@torch.no_grad()
def test_churn_ends_where_the_published_sampler_does(model, name):
    fixture, denoiser = model(name)
    churn = partial(heun, S_churn=40.0, S_tmin=0.05, S_tmax=50.0, S_noise=1.003)
    if name == "iddpm_adm":
        churn = partial(churn, nearest=nearest)
    sampler = replace(sampler_of(fixture, 10), integrate=churn)
    # The reference draws at every level, also at 80 where nothing is churned; ours does not.
    noise = iter(fixture["churn_noise"][1:])
    denoise = partial(denoiser, **condition(fixture, count=2))
    end = sampler(denoise, fixture["latents"], lambda like: next(noise))
    assert relative(end, fixture["out/churn_10"]) < 1e-4
