"""Noise levels, schedules and preconditioning against published constants and the definitions."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_pl.diffusion import levels
from diffusion_pl.diffusion.paths import Along, Linear, VarianceExploding, VariancePreserving
from diffusion_pl.diffusion.preconditioning import Karras
from diffusion_pl.diffusion.schedules import LogNormal, LogUniform, Rho, uniform
from diffusion_pl.diffusion.schedules import levels as walk
from diffusion_pl.diffusion.timesteps import CosineBetas, LinearBetas, Timesteps
from diffusion_pl.errors import UserError
from diffusion_pl.objectives.ddpm import PredictNoise

F64 = torch.float64

# Karras 2022, Eq. 5 with N = 18, rho = 7, 0.002 to 80, to the digits of the specification sheet.
KARRAS_18 = [
    80, 57.58598, 40.78557, 28.37458, 19.35245, 12.91008, 8.400935, 5.315195, 3.256822, 1.923340,
    1.088171, 0.5853481, 0.2964423, 0.1395165, 0.05994731, 0.02293452, 0.00752802, 0.002,
]  # fmt: skip


def test_rho_levels_are_the_published_ones():
    sigmas = walk(Rho(), 18)
    assert sigmas[-1] == 0
    torch.testing.assert_close(sigmas[:-1], torch.tensor(KARRAS_18, dtype=F64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rho", [0.0, -7.0, math.inf])
def test_rho_is_positive_and_finite(rho):
    with pytest.raises(UserError, match="rho must be positive and finite"):
        Rho(rho=rho)


def test_log_normal_has_the_published_quantiles():
    quantiles = torch.tensor([0.15865525, 0.5, 0.84134475], dtype=F64)
    sigmas = LogNormal(-1.2, 1.2)(quantiles)
    expected = torch.tensor([math.exp(-2.4), math.exp(-1.2), 1.0], dtype=F64)
    torch.testing.assert_close(sigmas, expected, rtol=1e-6, atol=0)


def test_linear_betas_have_the_published_signal_scales():
    abar = levels.alpha_bar_from_sigma(LinearBetas().sigmas())
    published = {
        0: 0.9999, 99: 0.897018146, 249: 0.524085374, 499: 0.0785872429,
        749: 0.00335055044, 999: 4.03582977e-05,
    }  # fmt: skip
    for index, value in published.items():
        assert abar[index].item() == pytest.approx(value, rel=1e-8)


def test_linear_betas_have_the_published_log_snr():
    log_snr = levels.log_snr_from_sigma(LinearBetas().sigmas())
    for index, value in {0: 9.21024, 499: -2.46170, 999: -10.11767}.items():
        assert log_snr[index].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    "schedule",
    [LogNormal(-1.2, 1.2), Rho(), LogUniform(0.02, 100), LinearBetas(T=50), CosineBetas(T=50)],
)
def test_schedules_increase(schedule):
    sigmas = schedule(torch.linspace(0, 1, 1001, dtype=F64))
    assert torch.isfinite(sigmas).all()
    assert (sigmas.diff() >= 0).all()
    assert sigmas[0] > 0


def test_a_table_is_drawn_uniformly_and_walked_whole():
    table = LinearBetas(T=10)
    u = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    _, counts = table(u).unique(return_counts=True)
    assert counts.tolist() == [100] * 10
    torch.testing.assert_close(walk(table, 10)[:-1], table.sigmas().flip(0))


def test_more_steps_than_levels_are_refused():
    with pytest.raises(ValueError, match="no 11 different noise levels"):
        walk(LinearBetas(T=10), 11)


def test_no_step_at_all_is_refused():
    with pytest.raises(ValueError, match="at least 1 step"):
        uniform(0)


def test_timesteps_are_exact_on_the_table_and_monotone_between():
    table = LinearBetas()
    sigmas = table.sigmas()
    assert torch.equal(table.timestep(sigmas), torch.arange(1000, dtype=F64))
    dense = torch.exp(torch.linspace(math.log(1e-3), math.log(1e3), 5000, dtype=F64))
    steps = table.timestep(dense)
    assert (steps.diff() >= 0).all()
    assert (steps[0], steps[-1]) == (0, 999)


def test_a_ddpm_network_sees_the_variance_preserving_state():
    sigma = torch.tensor([0.3, 2.0, 50.0], dtype=F64)
    c = PredictNoise(LinearBetas())(sigma)
    abar = levels.alpha_bar_from_sigma(sigma)
    image, noise = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    x_t = abar.sqrt() * image + (1 - abar).sqrt() * noise  # Ho 2020, Eq. 4
    torch.testing.assert_close(c.c_in * (image + sigma * noise), x_t)
    # Given the true noise the denoiser returns the true image: Ho 2020, Eq. 15.
    torch.testing.assert_close(c.c_skip * (image + sigma * noise) + c.c_out * noise, image)


def test_karras_coefficients_are_the_published_ones():
    # sigma: c_skip, c_out, c_in, c_noise at sigma_data = 0.5.
    published = {
        0.002: (0.999984, 0.001999984, 1.999984, -1.553652),
        0.5: (0.5, 0.35355339, 1.4142136, -0.1732868),
        1.0: (0.2, 0.4472136, 0.89442719, 0.0),
        80.0: (3.9060974e-05, 0.49999023, 0.012499756, 1.0955067),
    }
    for sigma, expected in published.items():
        c = Karras(0.5)(torch.tensor(sigma, dtype=F64))
        assert [value.item() for value in c] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_conversions_invert_one_another():
    sigma = torch.logspace(-3, 3, 50, dtype=F64)
    there = levels.alpha_bar_from_sigma(sigma)
    torch.testing.assert_close(levels.sigma_from_alpha_bar(there), sigma, rtol=1e-9, atol=0)
    there = levels.log_snr_from_sigma(sigma)
    torch.testing.assert_close(levels.sigma_from_log_snr(there), sigma)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rho(sigma_min=2, sigma_max=1), "0 < sigma_min < sigma_max"),
        (lambda: LogUniform(0, 1), "0 < sigma_min < sigma_max"),
        (lambda: LogNormal(0, 0), "std must be positive"),
        (lambda: Karras(0), "sigma_data must be positive"),
        (lambda: LinearBetas(T=1), "T must be at least 2"),
        (lambda: LinearBetas(beta_1=0.5, beta_T=0.1), "beta_1 <= beta_T"),
        (lambda: CosineBetas(offset=0), "offset positive"),
        (lambda: Timesteps(torch.tensor([0.1, 1.5])), "all between 0 and 1"),
        (lambda: VariancePreserving(beta_d=0), "must be positive"),
        (lambda: Along(Linear(), 1.0, 0.5), "start must lie below end"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_log_uniform_is_uniform_in_the_logarithm():
    sigmas = LogUniform(0.01, 100.0)(torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=F64))
    torch.testing.assert_close(sigmas, torch.tensor([0.01, 0.1, 1.0, 100.0], dtype=F64))


def test_cosine_betas_are_the_published_ones():
    betas = CosineBetas(1000).betas
    # Nichol & Dhariwal 2021, Eq. 17; digits of the specification sheet.
    assert betas[[0, -2, -1]].tolist() == pytest.approx([4.12842248e-05, 0.749999393, 0.999])
    assert CosineBetas(4000).betas[0].item() == pytest.approx(9.86581881e-06)
    abar = levels.alpha_bar_from_sigma(CosineBetas(1000).sigmas())
    assert abar[499].item() == pytest.approx(0.49384359)
    # The same levels as Karras 2022's u_j, counted from the noise end (Table 1, "iDDPM").
    u = CosineBetas(1000).sigmas().flip(0)
    published = {0: 20291.17, 1: 641.66, 8: 80.20, 500: 1.0123895, 998: 0.00935, 999: 0.006425}
    for j, value in published.items():
        assert u[j].item() == pytest.approx(value, rel=1e-4)


def test_the_variance_preserving_path_is_the_published_one():
    t = torch.tensor([1e-3, 0.5, 1.0], dtype=F64)
    expected = torch.tensor([0.010485993, 3.4129183, 152.16697], dtype=F64)
    torch.testing.assert_close(VariancePreserving().sigma(t), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("path", [VariancePreserving(), VarianceExploding(), Linear()])
def test_paths_agree_with_their_slope_and_inverse(path):
    t = torch.linspace(0.05, 1.0, 20, dtype=F64, requires_grad=True)
    sigma = path.sigma(t)
    (derivative,) = torch.autograd.grad(sigma.sum(), t)
    torch.testing.assert_close(path.slope(t), derivative)
    torch.testing.assert_close(path.time(sigma), t)


def test_along_a_path_time_is_uniform():
    u = torch.tensor([0.0, 0.25, 1.0], dtype=F64)
    sigmas = Along(VarianceExploding(), 4.0, 16.0)(u)
    torch.testing.assert_close(sigmas, torch.tensor([2.0, math.sqrt(7), 4.0], dtype=F64))
