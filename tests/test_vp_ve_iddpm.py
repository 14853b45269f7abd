"""The other columns of Karras 2022's Table 1 against published constants and their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.diffusion.timesteps import CosineBetas
from diffusion_pl.objectives.edm_iddpm import IDDPM, RoundedRho, nearest
from diffusion_pl.objectives.ve import VE
from diffusion_pl.objectives.vp import VP

F64 = torch.float64
OBJECTIVES = {"vp": VP(), "ve": VE(), "iddpm": IDDPM()}
# Lowest and highest level of each network, Karras 2022, App. C and released code.
RANGES = {"vp": (0.0010005, 152.16697), "ve": (0.02, 100), "iddpm": (0.006425, 20291.17)}
NAMES = pytest.mark.parametrize("name", OBJECTIVES)


@NAMES
def test_training_covers_exactly_the_published_range(name):
    objective = OBJECTIVES[name]
    assert objective.preconditioning.sigma_range == pytest.approx(RANGES[name], rel=1e-4)
    ends = objective.schedule(torch.tensor([0.0, 1.0], dtype=F64))
    assert ends.tolist() == pytest.approx(RANGES[name], rel=1e-4)


@NAMES
def test_the_network_sees_the_noise_and_what_it_says_of_it_is_taken_off(name):
    sigma = torch.tensor([0.03, 0.7, 40.0], dtype=F64)
    c = OBJECTIVES[name].preconditioning(sigma)
    source = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 3, dtype=F64, generator=source)
    # VP and iDDPM predict eps from a state of variance alpha^2 + 1 - alpha^2; VE's sign is its own.
    told = -noise if name == "ve" else noise
    torch.testing.assert_close(c.c_skip * (image + sigma * noise) + c.c_out * told, image)
    scale = torch.ones(3, dtype=F64) if name == "ve" else 1 / (1 + sigma**2).sqrt()
    torch.testing.assert_close(c.c_in, scale)


def test_vp_is_told_999_times_its_time():
    # sigma(1e-3), sigma(0.5) and sigma(1), to the digits of the specification sheet.
    sigma = torch.tensor([0.010485993, 3.4129183, 152.16697], dtype=F64)
    told = VP().preconditioning(sigma).c_noise
    assert told.tolist() == pytest.approx([0.999, 499.5, 999], rel=1e-6)


def test_vp_draws_time_uniformly():
    u = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    time = VP().preconditioning.path.time(VP().schedule(u))
    assert time.tolist() == pytest.approx([1e-5, (1 + 1e-5) / 2, 1], rel=1e-9)


def test_ve_is_told_the_logarithm_of_half_the_level():
    sigma = torch.tensor([0.02, 2.0, 100.0], dtype=F64)
    told = VE().preconditioning(sigma).c_noise
    assert told.tolist() == pytest.approx([math.log(0.01), 0, math.log(50)])


def test_iddpm_is_told_the_timestep_of_the_nearest_level():
    # j counts from the noise: u_0, u_8, u_500, u_998 and u_999 are timesteps 999 - j.
    published = {20291.17: 999, 80.20: 991, 1.0123895: 499, 0.00935: 1, 0.006425: 0}
    sigma = torch.tensor(list(published), dtype=F64)
    precondition = IDDPM().preconditioning
    assert precondition(sigma).c_noise.tolist() == list(published.values())
    # Beyond either end, and to either side of half way between u_8 and u_9, 80.20 and 71.29.
    sigma = torch.tensor([1e-9, 1e9, 75.7, 75.8], dtype=F64)
    assert precondition(sigma).c_noise.tolist() == [0, 999, 990, 991]


@pytest.mark.parametrize("sigma", [0.001, 0.0081, 1.3, 75.74, 75.76, 1e5])
def test_the_nearest_level_is_no_further_than_any_other(sigma):
    table = CosineBetas().sigmas()
    rounded = nearest(sigma)
    assert rounded in table.tolist()
    assert abs(rounded - sigma) == (table - sigma).abs().min().item()


def test_sampling_levels_of_a_table_are_kept_within_it_and_rounded():
    u = torch.linspace(0, 1, 18, dtype=F64)
    table = CosineBetas().sigmas()
    expected = [nearest(sigma) for sigma in Rho(float(table[0]), 80.0)(u).tolist()]
    assert RoundedRho()(u).tolist() == expected
    assert RoundedRho()(u)[[0, -1]].tolist() == pytest.approx([0.006425, 80.2037], rel=1e-4)


@NAMES
def test_the_loss_is_the_noises_squared_error_summed_over_pixels(name):
    objective = OBJECTIVES[name]
    source = torch.Generator().manual_seed(0)
    image, noise, wrong = torch.randn(3, 4, 3, 4, 4, generator=source)
    u = torch.tensor([0.2, 0.4, 0.6, 0.7], dtype=F64)
    sigma = objective.schedule(u).float().reshape(-1, 1, 1, 1)
    losses = objective.loss(lambda x, s: image + sigma * (noise - wrong), image, u, noise)
    expected = (noise - wrong).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
