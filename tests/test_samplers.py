"""Samplers against closed-form solutions, published end values and orders of convergence."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from analytic import Gaussian, Mixture

from diffusion_pl.diffusion.levels import alpha_bar_from_sigma
from diffusion_pl.diffusion.paths import VarianceExploding, VariancePreserving
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.schedules import Rho, levels
from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.deis import deis
from diffusion_pl.samplers.dpm_solver import dpmpp_2m, dpmpp_3m
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.exponential_adams import exponential_adams
from diffusion_pl.samplers.generalised import generalised
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.named import NAMED, named
from diffusion_pl.samplers.sampler import Sampler, check_range
from diffusion_pl.samplers.unipc import unipc

F64 = torch.float64
DATA = Gaussian(std=0.5)
START = torch.full((1, 1, 1, 1), 80.0, dtype=F64)
INTEGRATORS = {name: integrate for name, (integrate, _) in NAMED.items()}


def no_noise(like):
    raise AssertionError("a deterministic sampler drew noise")


# End values on data N(0, 0.5^2) from x = 80, to the digits of the specification sheet.
@pytest.mark.parametrize(
    ("integrate", "steps", "end"),
    [
        (heun, 18, 0.527624637),
        (heun, 40, 0.504876865),
        (heun, 256, 0.500095425),
        (euler, 18, 0.423031436),
        (euler, 40, 0.464850775),
        (dpmpp_2m, 18, 0.531140074),
        (dpmpp_2m, 40, 0.505192425),
    ],
)
def test_end_values_on_the_gaussian_are_the_published_ones(integrate, steps, end):
    result = integrate(DATA.denoise, START, levels(Rho(), steps), no_noise)
    assert result.item() == pytest.approx(end, rel=1e-8)


@pytest.mark.parametrize(
    ("integrate", "calls"),
    [
        (euler, 18),
        (ancestral, 18),
        (heun, 35),
        (partial(heun, alpha=0.5), 36),
        (partial(heun, S_churn=40.0), 35),
        (dpmpp_2m, 18),
        (partial(dpmpp_2m, eta=1.0), 18),
        (dpmpp_3m, 18),
        (partial(dpmpp_3m, eta=1.0), 18),
        (exponential_adams, 18),
        (partial(exponential_adams, eta=1.0), 18),
        (deis, 18),
        (unipc, 18),
        (partial(unipc, order=3), 18),
        (partial(generalised, path=VariancePreserving(), scaled=True, order=1), 18),
        (partial(generalised, path=VarianceExploding()), 35),
    ],
)
def test_the_network_is_evaluated_as_often_as_stated(integrate, calls):
    count = []

    def denoise(x, sigma):
        count.append(float(sigma))
        return DATA.denoise(x, sigma)

    integrate(denoise, START, levels(Rho(), 18), ImageNoise(0, [0]))
    assert len(count) == calls
    assert min(count) > 0  # the network never sees sigma = 0


@pytest.mark.parametrize("integrate", INTEGRATORS.values(), ids=INTEGRATORS.keys())
def test_a_sampler_leaves_its_start_as_it_was_and_its_state_in_float64(integrate):
    x = torch.full((1, 1, 2, 2), 80.0, dtype=F64)
    end = integrate(
        lambda x, s: DATA.denoise(x, s).float(), x, levels(Rho(), 6), ImageNoise(0, [0])
    )
    assert torch.equal(x, torch.full_like(x, 80.0))
    assert end.dtype == F64


def test_euler_is_ddim():
    """Song 2021, Eq. 12 with eta = 0, in the variance-preserving state and Song's own symbols."""
    sigmas = levels(LinearBetas(), 10)
    abar = alpha_bar_from_sigma(sigmas)
    z = torch.linspace(-2, 2, 5, dtype=F64).reshape(5, 1, 1, 1)
    x = z / abar[0].sqrt()
    for now, after, sigma in zip(abar[:-1], abar[1:], sigmas[:-1], strict=True):
        x_0 = Mixture().denoise(z / now.sqrt(), sigma)
        eps = (z - now.sqrt() * x_0) / (1 - now).sqrt()
        z = after.sqrt() * x_0 + (1 - after).sqrt() * eps
    torch.testing.assert_close(euler(Mixture().denoise, x, sigmas), z, rtol=1e-9, atol=1e-9)


# DDIM on timesteps 0, 1000/S, ... from x_T = 1, data N(0, 0.5^2); the specification sheet's digits.
@pytest.mark.parametrize(
    ("steps", "end"), [(10, 0.3741285), (50, 0.4724391), (100, 0.4859806), (1000, 0.4984953)]
)
def test_ddim_end_values_are_the_published_ones(steps, end):
    table = LinearBetas().sigmas()[:: 1000 // steps].flip(0)
    sigmas = torch.cat([table, torch.zeros(1, dtype=F64)])
    x = torch.ones(1, 1, 1, 1, dtype=F64) * torch.sqrt(1 + table[0] ** 2)
    assert euler(DATA.denoise, x, sigmas).item() == pytest.approx(end, abs=1e-7)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("t", [1, 2, 499, 999])
def test_ancestral_step_is_the_ddpm_posterior(variance, t):
    """Ho 2020, Eq. 6 and 7 and section 3.2, in Ho's own state and symbols."""
    betas = LinearBetas().betas
    abar = torch.cumprod(1 - betas, 0)
    beta, now, before = betas[t], abar[t], abar[t - 1]
    x_0, x_t, z = torch.tensor([[0.3, -0.7], [1.2, 0.4], [0.9, -1.1]], dtype=F64)
    mean = (
        before.sqrt() * beta / (1 - now) * x_0 + (1 - beta).sqrt() * (1 - before) / (1 - now) * x_t
    )
    var = beta if variance == "large" else (1 - before) / (1 - now) * beta
    expected = mean + var.sqrt() * z

    sigmas = LinearBetas().sigmas()[[t, t - 1]]
    state = (x_t / now.sqrt()).reshape(2, 1, 1, 1)
    step = ancestral(
        lambda x, sigma: x_0.reshape(2, 1, 1, 1),
        state,
        sigmas,
        lambda like: z.reshape(2, 1, 1, 1),
        variance=variance,
    )
    torch.testing.assert_close(step.flatten() * before.sqrt(), expected, rtol=1e-9, atol=1e-9)


def test_posterior_variances_are_the_published_ones():
    sigmas, abar = LinearBetas().sigmas(), torch.cumprod(1 - LinearBetas().betas, 0)
    for t, small in {1: 5.45318766e-05, 499: 0.0100313554, 999: 0.0199999835}.items():
        zero, one = torch.zeros(1, 1, 1, 1, dtype=F64), torch.ones(1, 1, 1, 1, dtype=F64)
        step = ancestral(lambda x, s: zero, zero, sigmas[[t, t - 1]], lambda like: one)  # noqa: B023
        assert step.item() ** 2 * abar[t - 1].item() == pytest.approx(small, rel=1e-8)


def test_no_eta_is_ddim():
    sigmas = levels(LinearBetas(), 20)
    x = torch.linspace(-100, 100, 9, dtype=F64).reshape(9, 1, 1, 1)
    noiseless = ancestral(Mixture().denoise, x, sigmas, no_noise, eta=0.0)
    torch.testing.assert_close(noiseless, euler(Mixture().denoise, x, sigmas))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noisy_ddim_is_songs_step(eta):
    """Song 2021, Eq. 12 and 16, in the variance-preserving state and Song's own symbols."""
    sigmas = LinearBetas().sigmas()[[700, 400]]
    now, after = alpha_bar_from_sigma(sigmas)
    x_0, eps, z = torch.tensor([[0.3, -0.7], [1.2, 0.4], [0.9, -1.1]], dtype=F64)
    c = eta * torch.sqrt((1 - after) / (1 - now)) * torch.sqrt(1 - now / after)
    expected = after.sqrt() * x_0 + torch.sqrt(1 - after - c**2) * eps + c * z
    step = ancestral(
        lambda x, sigma: x_0.reshape(2, 1, 1, 1),
        (x_0 + sigmas[0] * eps).reshape(2, 1, 1, 1),
        sigmas,
        lambda like: z.reshape(2, 1, 1, 1),
        eta=eta,
    )
    torch.testing.assert_close(step.flatten() * after.sqrt(), expected, rtol=1e-9, atol=1e-9)


# Std at the end of the whole chain on data N(0, 0.5^2): the specification sheet's recursion.
@pytest.mark.parametrize(("variance", "std"), [("large", 0.5007515), ("small", 0.4961101)])
def test_the_ddpm_chain_ends_with_the_known_spread(variance, std):
    sigmas = levels(LinearBetas(), 1000)
    # The chain is linear with Gaussian noise: its variance follows from its answers to 1 and 0.
    one, zero = torch.ones(1, 1, 1, 1, dtype=F64), torch.zeros(1, 1, 1, 1, dtype=F64)
    total = 1 + sigmas[0].item() ** 2  # x_T ~ N(0, I)
    for now, after in pairwise(sigmas):
        pair = torch.stack([now, after])
        slope = ancestral(DATA.denoise, one, pair, lambda like: zero, variance=variance).item()
        noise = ancestral(DATA.denoise, zero, pair, lambda like: one, variance=variance).item()
        total = slope**2 * total + noise**2
    assert math.sqrt(total) == pytest.approx(std, abs=2e-7)


@pytest.mark.parametrize(
    "integrate",
    [
        partial(ancestral, variance="small"),
        partial(ancestral, variance="large"),
        partial(ancestral, eta=0.5),
        partial(ancestral, variance=0.3),
        partial(heun, S_churn=40.0, S_tmin=0.05, S_tmax=50.0, S_noise=1.0),
        partial(heun, S_churn=40.0, alpha=0.5),
        *INTEGRATORS.values(),
    ],
)
def test_samplers_end_in_the_data_distribution(integrate):
    """Kolmogorov-Smirnov against the exact CDF of the mixture."""
    data = Mixture()
    count, side = 64, 16
    noise = ImageNoise(3, range(count))
    x = 80.0 * noise(torch.empty(count, 1, side, side, dtype=F64))
    end = integrate(data.denoise, x, levels(Rho(), 120), noise).flatten().sort().values
    # The network's last level is 0.002 and 120 steps leave a bias below 0.01; the statistic's own
    # 99.9 % point at 16,384 samples is 1.95 / sqrt(16384) = 0.015.
    empirical = (torch.arange(len(end), dtype=F64) + 0.5) / len(end)
    assert (data.cdf(end) - empirical).abs().max() < 0.025


def test_churn_raises_the_noise_by_the_clamped_factor():
    levels_seen = []

    def denoise(x, sigma):
        levels_seen.append(float(sigma))
        return torch.zeros_like(x)

    sigmas = torch.tensor([10.0, 1.0, 0.01, 0.0], dtype=F64)
    one = torch.ones(1, 1, 1, 1, dtype=F64)
    heun(denoise, one, sigmas, torch.zeros_like, S_churn=0.3, S_tmin=0.5, S_tmax=5.0)
    assert levels_seen == pytest.approx([10, 1, 1 * 1.1, 0.01, 0.01])
    levels_seen.clear()
    heun(denoise, one, sigmas, torch.zeros_like, S_churn=99.0, S_tmin=0.5)
    root = math.sqrt(2)
    assert levels_seen == pytest.approx([10 * root, 1, root, 0.01, 0.01])


def test_churn_adds_noise_of_the_right_size():
    seen = []

    def denoise(x, sigma):
        seen.append(x.clone())
        return torch.zeros_like(x)

    zero = torch.zeros(1, 1, 1, 1, dtype=F64)
    sigmas = torch.tensor([2.0, 0.0], dtype=F64)
    heun(denoise, zero, sigmas, torch.ones_like, S_churn=0.2, S_noise=1.5)
    assert seen[0].item() == pytest.approx(1.5 * math.sqrt((2 * 1.2) ** 2 - 2**2))


def test_the_start_is_scaled_to_the_first_level():
    starts = []

    def integrate(denoise, x, sigmas, randn_like):
        starts.append((x.dtype, x.mean().item()))
        return x

    noise = torch.ones(1, 1, 2, 2)
    for unit_start in (False, True):
        sampler = Sampler(integrate, Rho(), 5, unit_start=unit_start)
        assert sampler(DATA.denoise, noise, no_noise).dtype == torch.float32
    assert starts == [(F64, 80.0), (F64, pytest.approx(math.sqrt(1 + 80.0**2)))]


def test_clipping_is_applied_to_the_denoised_image():
    sampler = Sampler(euler, Rho(), 5, clip_denoised=True)
    assert sampler(lambda x, sigma: x * 0 + 7, torch.ones(1, 1, 2, 2), no_noise).max() == 1


def test_a_sampler_beyond_the_networks_levels_is_refused():
    with pytest.raises(ValueError, match=r"noise levels 80 to 0\.002"):
        check_range(Sampler(heun, Rho(), 18), (0.01, 100.0))
    check_range(Sampler(heun, Rho(0.01, 100.0), 18), (0.01, 100.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 1.5}, "eta must be in"),
        ({"eta": 0.5, "variance": "large"}, "belongs to eta = 1"),
        ({"eta": 0.5, "variance": "learned"}, "belongs to eta = 1"),
        ({"variance": 1.2}, r"variance must be in \[0, 1\]"),
        ({"variance": "larg"}, "small, large, learned or a number"),
    ],
)
def test_impossible_ancestral_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ancestral(DATA.denoise, START, levels(Rho(), 3), torch.zeros_like, **options)


def test_churned_levels_are_rounded_to_those_the_network_knows():
    seen = []

    def denoise(x, sigma):
        seen.append((float(sigma), x.item()))
        return torch.zeros_like(x)

    zero, sigmas = torch.zeros(1, 1, 1, 1, dtype=F64), torch.tensor([2.0, 0.0], dtype=F64)
    heun(denoise, zero, sigmas, torch.ones_like, S_churn=0.2, nearest=lambda sigma: 2.5)
    assert seen == [(2.5, pytest.approx(math.sqrt(2.5**2 - 2**2)))]


def test_the_second_slope_is_taken_where_alpha_says_and_weighted_so():
    """Karras 2022, App. D.2, in the paper's own symbols."""
    sigma, following, x = 3.0, 1.0, 2.0
    data = Mixture()

    def slope(state, level):
        at = torch.tensor([[[[state]]]], dtype=F64)
        return (state - data.denoise(at, torch.tensor(level, dtype=F64)).item()) / level

    for alpha in (0.5, 0.8, 1.0, 1.1):
        h, d = following - sigma, slope(x, sigma)
        d_2 = slope(x + alpha * h * d, sigma + alpha * h)
        expected = x + h * ((1 - 1 / (2 * alpha)) * d + d_2 / (2 * alpha))
        state, pair = torch.full((1, 1, 1, 1), x, dtype=F64), torch.tensor([sigma, following])
        end = heun(data.denoise, state, pair.to(F64), no_noise, alpha=alpha)
        assert end.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("v", [-1.0, -0.4, 1.0, 1.3])
def test_the_learned_variance_is_the_networks(v):
    """Nichol & Dhariwal 2021, Eq. 15, in their own state."""
    betas, t = LinearBetas().betas, 400
    abar = torch.cumprod(1 - betas, 0)
    beta, now, before = betas[t], abar[t], abar[t - 1]
    tilde = (1 - before) / (1 - now) * beta
    frac = (v + 1) / 2
    expected = torch.exp(frac * beta.log() + (1 - frac) * tilde.log())

    def denoise(x, sigma, *, variance):
        assert variance
        return torch.cat([torch.zeros_like(x), torch.full_like(x, v)], dim=1)

    zero = torch.zeros(1, 3, 2, 2, dtype=F64)
    pair = LinearBetas().sigmas()[[t, t - 1]]
    step = ancestral(denoise, zero, pair, torch.ones_like, variance="learned")
    assert step.shape == zero.shape
    torch.testing.assert_close(step.square() * before, expected.expand(zero.shape))


def test_a_variance_between_small_and_large_is_interpolated_in_its_logarithm():
    """log var = f log((1 - r) sigma_t^2) + (1 - f) log((1 - r) sigma_s^2), variance preserving."""
    sigma, following, f = 3.0, 2.0, 0.3
    r = (following / sigma) ** 2
    vp = [level**2 / (1 + level**2) for level in (sigma, following)]
    expected = (1 - r) * vp[0] ** f * vp[1] ** (1 - f)
    zero, pair = torch.zeros(1, 1, 1, 1, dtype=F64), torch.tensor([sigma, following], dtype=F64)
    step = ancestral(lambda x, s: zero, zero, pair, torch.ones_like, variance=f)
    assert step.item() ** 2 / (1 + following**2) == pytest.approx(expected)


def test_a_named_sampler_keeps_to_the_networks_levels():
    sampler = named("deis", (0.01, 50.0))
    sigmas = sampler.sigmas()
    assert (sigmas[0].item(), sigmas[-2].item()) == (pytest.approx(50), pytest.approx(0.01))
    assert named("deis", (0.0, math.inf), steps=7).steps == 7
    with pytest.raises(ValueError, match="there is no sampler 'dies'"):
        named("dies", (0.0, math.inf))


def test_alpha_must_be_positive():
    with pytest.raises(ValueError, match="alpha must be positive"):
        heun(DATA.denoise, START, levels(Rho(), 3), torch.zeros_like, alpha=0.0)


def test_negative_churn_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        heun(DATA.denoise, START, levels(Rho(), 3), torch.zeros_like, S_churn=-1.0)
