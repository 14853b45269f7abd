"""Simple diffusion and SiD2: the papers' numbers, and what follows from their formulas."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from analytic import Gaussian

from diffusion_pl.diffusion.levels import log_snr_from_sigma
from diffusion_pl.objectives.shifted_cosine import InterpolatedCosine, ShiftedCosine, above_zero
from diffusion_pl.objectives.simple_diffusion import Multiscale, PredictVelocity, SimpleDiffusion
from diffusion_pl.objectives.simpler_diffusion import SigmoidBound, SimplerDiffusion
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.sampler import Sampler, check_range


class Answer(torch.nn.Module):
    """A network that always says the same."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, c_noise):
        return self.answer


def log_snr(schedule, *u):
    return log_snr_from_sigma(schedule(torch.tensor(u, dtype=torch.float64))).tolist()


# The golden values were computed from the papers' formulas independently of this code.
def test_the_cosine_has_the_known_log_snr():
    known = [15, 3.679740, 1.761183, 0, -1.761183, -3.679740, -15]
    got = log_snr(ShiftedCosine(64, 64), 0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    assert got == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize(
    ("moved", "known"),
    [
        (True, [12.2274, 0.9072, -2.7726, -6.4523, -17.7726]),
        (False, [15, 0.9141, -2.7684, -6.4326, -15]),
    ],
)
def test_the_shifted_cosine_has_the_known_log_snr_with_either_ends(moved, known):
    schedule = ShiftedCosine(256, 64, moved_ends=moved)
    assert log_snr(schedule, 0, 0.1, 0.5, 0.9, 1) == pytest.approx(known, abs=6e-5)


@pytest.mark.parametrize(
    ("at_image", "known"),
    [(False, [-0.664832, -3.465736, -6.266640]), (True, [-2.744273, -3.465736, -4.187198])],
)
def test_the_interpolated_cosine_has_the_known_log_snr_in_either_direction(at_image, known):
    schedule = InterpolatedCosine(512, moved_ends=True, low_at_image=at_image)
    assert log_snr(schedule, 0.25, 0.5, 0.75) == pytest.approx(known, abs=1e-6)
    kept = InterpolatedCosine(512, low_at_image=at_image)
    assert log_snr(kept, 0, 1) == pytest.approx([15, -15], abs=1e-6)


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("at_image", [True, False])
def test_levels_increase_also_where_the_references_lie_far_apart(moved, at_image):
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    schedule = InterpolatedCosine(736, 32, 735, moved_ends=moved, low_at_image=at_image)
    assert (schedule(u).diff() > 0).all()
    with pytest.raises(ValueError, match=r"below 23 low \(got 32 and 736\)"):
        InterpolatedCosine(736, 32, 736)


def test_averaged_pixels_are_as_noisy_as_an_image_of_the_reference():
    """Section 3.1's reason for the shift, on noise itself: 4 x 4 pixels of 256 make one of 64."""
    u = torch.tensor(0.4, dtype=torch.float64)
    shifted = ShiftedCosine(256, 64, moved_ends=True)(u)
    noise = shifted * torch.randn(1, 1, 1024, 1024, generator=torch.Generator().manual_seed(0))
    averaged = torch.nn.functional.avg_pool2d(noise, 4).std()
    assert averaged == pytest.approx(float(ShiftedCosine(64, 64)(u)), rel=0.01)


@pytest.mark.parametrize("moved", [True, False])
def test_the_speed_is_the_derivative_of_the_log_snr(moved):
    schedule = ShiftedCosine(256, 32, moved_ends=moved)
    u = torch.tensor([0.01, 0.3, 0.8], dtype=torch.float64, requires_grad=True)
    sigma = schedule(u)
    (slope,) = torch.autograd.grad(log_snr_from_sigma(sigma).sum(), u)
    torch.testing.assert_close(schedule.speed(sigma.detach()), -slope)


def test_the_sampler_leaves_out_the_end_and_its_steps_are_the_papers():
    """lambda((i + 1) / N) -> lambda(i / N), and from lambda(1 / N) to the image."""
    assert above_zero(4).tolist() == [1, 0.75, 0.5, 0.25]
    sigmas = Sampler(ancestral, ShiftedCosine(256, 32), 512, spacing=above_zero).sigmas()
    ends = ShiftedCosine(256, 32)(torch.tensor([1.0, 1 / 512, 0.0], dtype=torch.float64))
    assert sigmas[[0, -2]].tolist() == ends[:2].tolist()
    assert (len(sigmas), sigmas[-1]) == (513, 0)
    with pytest.raises(ValueError, match=r"at least 1 step \(got 0\)"):
        above_zero(0)


def test_the_chain_ends_in_the_data_whatever_the_variance():
    """Salimans & Ho's step in their own coordinates, against the frame's, on one Gaussian."""
    data, schedule = Gaussian(0.0, 0.5), ShiftedCosine(64, 64)
    sigmas = Sampler(ancestral, schedule, 64, spacing=above_zero).sigmas()
    for share in (0.0, 0.3, 1.0):
        # Everything is linear in the state, so its variance is known after every step.
        spread = 1.0  # of z, where alpha^2 + sigma_z^2 = 1
        for sigma, following in itertools.pairwise(sigmas[:-1].tolist()):
            alpha, alpha_s = (1 / math.hypot(1, level) for level in (sigma, following))
            r = (following / sigma) ** 2  # exp(lambda_t - lambda_s)
            gain = 0.25 * alpha / (0.25 * alpha**2 + (sigma * alpha) ** 2)  # x_hat = gain z
            small, large = (1 - r) * (following * alpha_s) ** 2, (1 - r) * (sigma * alpha) ** 2
            noise = large**share * small ** (1 - share)
            spread = (r * alpha_s / alpha + (1 - r) * alpha_s * gain) ** 2 * spread + noise
        last = sigmas[-2].item()
        known = math.sqrt(spread) * 0.25 / (0.25 + last**2) * math.hypot(1, last)
        z = torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(0)).double()
        source = torch.Generator().manual_seed(1)
        draw = partial(torch.randn, z.shape, generator=source, dtype=torch.float64)
        start = z * math.hypot(1, sigmas[0].item())
        end = ancestral(data.denoise, start, sigmas, lambda like, d=draw: d(), variance=share)
        assert end.std().item() == pytest.approx(known, rel=0.01)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"must be positive \(got 0 and 64\)"):
        ShiftedCosine(0, 64)
    with pytest.raises(ValueError, match=r"limit must be positive \(got -15\)"):
        ShiftedCosine(64, 64, limit=-15)
    with pytest.raises(ValueError, match=r"must lie below high"):
        InterpolatedCosine(512, 256, 32)


def test_the_network_that_predicts_v_exactly_denoises_exactly():
    x, eps = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 8, 8).double()
    sigma = torch.tensor([0.01, 30.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    alpha = 1 / torch.sqrt(1 + sigma**2)
    z = alpha * x + alpha * sigma * eps
    v = alpha * eps - alpha * sigma * x
    c = PredictVelocity(ShiftedCosine(64, 64))(sigma)
    torch.testing.assert_close(c.c_in * (x + sigma * eps), z)
    torch.testing.assert_close(c.c_skip * (x + sigma * eps) + c.c_out * v, x)


def test_the_networks_time_is_the_angle_whatever_the_shift():
    preconditioning = PredictVelocity(ShiftedCosine(512, 32))
    sigma = torch.tensor([1e-9, math.tan(0.15 * math.pi), 1.0, 1e9], dtype=torch.float64)
    ends = 2000 / math.pi * math.atan(math.exp(-10))  # logSNR clipped to +-20
    known = [ends, 300, 500, 1000 - ends]
    assert preconditioning(sigma).c_noise.tolist() == pytest.approx(known, abs=1e-9)


def test_the_network_knows_the_levels_of_its_schedule():
    low, high = SimpleDiffusion(ShiftedCosine(256, 32)).preconditioning.sigma_range
    assert (low, high) == pytest.approx((math.exp(-7.5), math.exp(7.5)))
    drawn_on = Sampler(ancestral, ShiftedCosine(256, 32), 512, clip_denoised=True)
    check_range(drawn_on, (low, high))
    with pytest.raises(ValueError, match="visits noise levels"):
        check_range(replace(drawn_on, schedule=ShiftedCosine(256, 32, limit=16)), (low, high))


def test_the_loss_is_the_mean_squared_error_of_eps():
    objective = SimpleDiffusion(ShiftedCosine(64, 64))
    source = torch.Generator().manual_seed(0)
    x, noise, v = (torch.randn(3, 3, 8, 8, generator=source) for _ in range(3))
    u = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    sigma = objective.schedule(u).float().reshape(-1, 1, 1, 1)
    alpha = torch.rsqrt(1 + sigma**2)
    z = alpha * (x + sigma * noise)
    eps = alpha * sigma * z + alpha * v  # sigma_z z + alpha v
    loss = objective.loss(objective.denoiser(Answer(v)), x, u, noise)
    torch.testing.assert_close(loss, (eps - noise).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_the_perfect_denoiser_has_the_least_loss():
    data, objective = Gaussian(0.1, 0.4), SimpleDiffusion(ShiftedCosine(8, 8), multiscale=True)
    source = torch.Generator().manual_seed(0)
    x = 0.1 + 0.4 * torch.randn(512, 1, 8, 8, generator=source)
    noise = torch.randn(x.shape, generator=source)
    u = (torch.arange(512, dtype=torch.float64) + 0.5) / 512

    def loss(factor, offset):
        return objective.loss(
            lambda x, sigma: factor * data.denoise(x, sigma.float()) + offset, x, u, noise
        ).mean()

    best = loss(1, 0)
    assert all(loss(*change) > best for change in [(0.95, 0), (1.05, 0), (1, 0.02), (1, -0.02)])


def test_the_multiscale_loss_of_white_and_constant_errors_is_known():
    # White: variance 4^-k after k halvings, so sum_k 4^-k 2^k / 128. Constant: sum_k 2^k / 128.
    white = torch.randn(64, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    known = (1 + 1 / 2 + 1 / 4) / 128
    assert Multiscale()(white).mean() == pytest.approx(known, rel=5e-3)
    constant = torch.full((2, 3, 128, 128), 0.5)
    assert Multiscale()(constant).tolist() == pytest.approx([0.25 * (1 + 2 + 4) / 128] * 2)
    # An error that alternates leaves nothing at any lower scale.
    sign = (-1.0) ** torch.arange(128)
    assert Multiscale()(sign.expand(1, 1, 128, 128)).item() == pytest.approx(1 / 128)
    for side in (48, 99):  # 24 would be below 32; 99 has no half
        ones = torch.ones(1, 3, side, side)
        assert Multiscale()(ones).item() == pytest.approx(1 / side)


def test_the_sigmoid_weight_has_the_known_values_on_the_eps_error():
    # b = -3 at logSNR -10, -3, 0, 3, 10.
    sigma = torch.exp(-torch.tensor([-10.0, -3, 0, 3, 10], dtype=torch.float64) / 2)
    weight = SimplerDiffusion(ShiftedCosine(512, 512), bias=-3, bound=False).weight(sigma)
    known = [0.999089, 0.5, 0.0474259, 0.00247262, 2.26032e-06]
    assert (weight * sigma.square()).tolist() == pytest.approx(known, rel=2e-6)


def test_the_bounds_form_is_the_sigmoid_on_the_eps_error_times_half_the_speed():
    schedule, bias = ShiftedCosine(256, 32), -2.0
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    snr = log_snr_from_sigma(schedule(u))
    (slope,) = torch.autograd.grad(snr.sum(), u)
    elbo = -slope / 2 * torch.sigmoid(bias - snr) * snr.exp()
    torch.testing.assert_close(SigmoidBound(bias, schedule)(schedule(u)), elbo)
    assert SimplerDiffusion(schedule).weight == SigmoidBound(-3.0, schedule)


def test_in_the_bounds_form_the_schedule_changes_no_mean_loss():
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000

    def mean(reference):
        schedule = ShiftedCosine(256, reference)
        sigma = schedule(u)
        error = sigma.square() * 0.09 / (0.09 + sigma.square())  # a Gaussian's least error
        return float((SigmoidBound(-1.0, schedule)(sigma) * error).mean())

    assert mean(32) == pytest.approx(mean(256), rel=1e-5)
