"""Sequences of timesteps against the papers' formulas, and the levels they lead to."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_pl.diffusion.paths import preserving_between
from diffusion_pl.diffusion.schedules import levels
from diffusion_pl.diffusion.spacings import DDIMQuadratic, DDIMUniform, IDDPMSteps, Respaced
from diffusion_pl.diffusion.timesteps import CosineBetas, LinearBetas
from diffusion_pl.samplers.euler import euler

F64 = torch.float64


def timesteps(spacing, steps, T=1000):
    return LinearBetas(T).index(spacing(steps)).tolist()


def test_ddim_uniform_is_the_papers_range():
    for steps in (2, 10, 50, 1000):
        expected = list(range(0, 1000, 1000 // steps))
        assert timesteps(DDIMUniform(), steps) == expected[::-1]


def test_ddim_quadratic_is_the_papers_sequence():
    # floor( linspace(0, sqrt(800), 5)^2 ) = (800 k^2 / 16) for k = 0 .. 4.
    assert timesteps(DDIMQuadratic(), 5) == [800, 450, 200, 50, 0]
    squares = {800 * k**2 // 99**2 for k in range(100)}
    assert timesteps(DDIMQuadratic(), 100) == sorted(squares, reverse=True)
    assert len(squares) < 100  # 0, 0, 0, 0, 1, ... : a level is visited once


def test_respaced_holds_both_ends_and_rounds():
    assert timesteps(Respaced(), 4) == [999, 666, 333, 0]
    assert timesteps(Respaced(10), 4, T=10) == [9, 6, 3, 0]
    assert timesteps(Respaced(), 250)[:3] == [999, 995, 991]  # 999 / 249 = 4.012


def test_iddpm_is_the_column_of_table_1():
    chosen = CosineBetas().index(IDDPMSteps()(18))
    j = [math.floor(8 + 991 * i / 17) for i in range(18)]
    assert (999 - chosen).tolist() == j
    sigmas = levels(CosineBetas(), 18, IDDPMSteps())
    assert sigmas[0].item() == pytest.approx(80.20, rel=1e-4)  # u_8 of the specification sheet
    assert sigmas[-2].item() == pytest.approx(0.006425, rel=1e-3)  # u_999
    for steps in range(2, 500):  # no rounding error falls short of the last j
        assert LinearBetas().index(IDDPMSteps()(steps)[-1:]).item() == 0


def test_iddpm_can_round_and_end_before_the_last_level():
    assert (999 - LinearBetas().index(IDDPMSteps(rounded=True)(9))).tolist() == [
        8, 132, 256, 380, 504, 627, 751, 875, 999,
    ]  # fmt: skip
    assert (999 - LinearBetas().index(IDDPMSteps(j_last=988)(3))).tolist() == [8, 498, 988]


@pytest.mark.parametrize(("steps", "end"), [(10, 0.3741285), (50, 0.4724391), (1000, 0.4984953)])
def test_ddim_end_values_are_reached_through_the_spacing(steps, end):
    # Data N(0, 0.5^2) from x_T = 1; the specification sheet's digits.
    sigmas = levels(LinearBetas(), steps, DDIMUniform())
    x = torch.sqrt(1 + sigmas[:1].square()).reshape(1, 1, 1, 1)
    result = euler(lambda x, sigma: 0.25 / (0.25 + sigma**2) * x, x, sigmas)
    assert result.item() == pytest.approx(end, abs=1e-7)


def test_the_path_between_two_levels_meets_both():
    times = torch.tensor([1e-3, 1.0], dtype=F64)
    found = preserving_between(0.02, 100.0).sigma(times)
    torch.testing.assert_close(found, torch.tensor([0.02, 100.0], dtype=F64))
    published = preserving_between(0.010485993, 152.16697)  # of the paper's own 19.9 and 0.1
    assert (published.beta_d, published.beta_min) == pytest.approx((19.9, 0.1), rel=1e-5)


@pytest.mark.parametrize(
    ("spacing", "steps", "message"),
    [
        (DDIMUniform(), 18, "18 steps do not divide 1000"),
        (DDIMUniform(), 1, "DDIMUniform: needs 2 to 1000 steps"),
        (DDIMQuadratic(), 1, "DDIMQuadratic: needs 2 to 1000 steps"),
        (Respaced(10), 11, "Respaced: needs 2 to 10 steps"),
        (IDDPMSteps(), 993, "IDDPMSteps: needs 2 to 992 steps"),
    ],
)
def test_fewer_steps_than_a_spacing_needs_are_refused(spacing, steps, message):
    with pytest.raises(ValueError, match=message):
        spacing(steps)
