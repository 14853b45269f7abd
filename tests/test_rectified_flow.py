"""Rectified flow in the frame: its loss and its sampler, against the flow's own variables."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from analytic import Gaussian, Mixture
from torch import nn

from diffusion_pl.diffusion.paths import Along
from diffusion_pl.objectives.rectified_flow import RectifiedFlow, Straight
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.sampler import Sampler

F64 = torch.float64


class Says(nn.Module):
    """A network with one stated answer that notes what it was shown."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, c_noise):
        self.seen = x, c_noise
        return self.answer


@pytest.mark.parametrize("objective", [RectifiedFlow(), RectifiedFlow(mean=0.5, std=1.0)])
def test_the_loss_is_the_squared_error_of_the_velocity(objective):
    source = torch.Generator().manual_seed(0)
    image, noise, guess = torch.randn(3, 32, 1, 4, 4, generator=source)
    u = (torch.arange(32, dtype=F64) + 0.5) / 32
    network = Says(guess)
    losses = objective.loss(objective.denoiser(network), image, u, noise)
    sigma = objective.schedule(u)
    t = (sigma / (1 + sigma)).float()
    shown, c_noise = network.seen
    at = t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(shown, (1 - at) * image + at * noise)
    torch.testing.assert_close(c_noise, 1000 * t)
    # Liu 2022, Eq. 1 with time from image to noise; float32 loses 1e-7 / t.
    expected = (guess - (noise - image)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_uniform_time_is_uniform_and_normal_logits_are_normal():
    u = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=F64)
    t = Straight().time(RectifiedFlow().schedule(u))
    assert t.tolist() == pytest.approx([1e-4, 0.25, 0.5, 1 - 1e-4], abs=1e-4)
    u = torch.tensor([0.15865525, 0.5, 0.84134475], dtype=F64)
    logits = Straight().time(RectifiedFlow(mean=0.5, std=1.5).schedule(u)).logit()
    assert logits.tolist() == pytest.approx([-1.0, 0.5, 2.0], abs=1e-6)


def test_the_straight_path_agrees_with_its_slope_and_inverse():
    t = torch.linspace(0.05, 0.95, 10, dtype=F64, requires_grad=True)
    sigma = Straight().sigma(t)
    torch.testing.assert_close(Straight().time(sigma), t)
    (derivative,) = torch.autograd.grad(sigma.sum(), t)
    torch.testing.assert_close(Straight().slope(t), derivative)


def test_euler_in_time_is_euler_in_sigma():
    data = Mixture()
    noise = torch.randn(16, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    steps, end = 20, 0.999
    times = [end * (1 - i / steps) for i in range(steps + 1)]
    # The flow's own: x_t' = x_t + (t' - t) v with v = (x_t - D) / t and D of x_t / (1 - t).
    x = noise * end
    for t, following in pairwise(times):
        sigma = torch.tensor(t / (1 - t), dtype=F64)
        velocity = (x - data.denoise(x / (1 - t), sigma)) / t
        x = x + (following - t) * velocity
    # The frame's: the schedule from end / steps to end has these times, then 0.
    sampler = Sampler(euler, Along(Straight(), end / steps, end), steps)
    assert Straight().time(sampler.sigmas()).tolist() == pytest.approx(times)
    drawn = sampler(data.denoise, noise, torch.randn_like)
    torch.testing.assert_close(drawn, x.float(), rtol=1e-5, atol=1e-5)


def test_the_flow_denoiser_of_the_exact_velocity_is_the_posterior_mean():
    # The velocity that least squares find is E(eps - x | x_t), so D = x_t - t v is E(x | x_t).
    data, sigma = Gaussian(std=0.5), torch.tensor(0.8, dtype=F64)
    noisy = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t = (sigma / (1 + sigma)).float()
    x_t = (1 - t) * noisy
    covariance = t - 0.25 * (1 - t)  # of eps - x with x_t
    network = Says(covariance / (0.25 * (1 - t) ** 2 + t**2) * x_t)
    denoised = RectifiedFlow().denoiser(network)(noisy, sigma)
    torch.testing.assert_close(denoised, data.denoise(noisy, sigma.float()))


def test_a_mean_without_a_deviation_is_refused():
    with pytest.raises(ValueError, match="needs a std"):
        RectifiedFlow(mean=0.5)
