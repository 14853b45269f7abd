"""The training objective against its definition and the denoiser that must minimise it."""

from __future__ import annotations

import pytest
import torch
from analytic import Gaussian
from torch import nn

from diffusion_pl.diffusion.classifier_free import classifier_free
from diffusion_pl.diffusion.guidance import clipped
from diffusion_pl.diffusion.objective import EpsWeight, UnitOutput, pixel_mean, pixel_sum
from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.objectives.ddpm import DDPM
from diffusion_pl.objectives.edm import EDM

F64 = torch.float64
OBJECTIVES = {"edm": EDM(), "ddpm": DDPM()}


def draws(count: int, pixels: int = 4):
    source = torch.Generator().manual_seed(1)
    image = 0.5 * torch.randn(count, 1, pixels, pixels, generator=source)
    noise = torch.randn(image.shape, generator=source)
    u = (torch.randperm(count, generator=source) + 0.5) / count
    return image, u.to(F64), noise


class Linear(nn.Module):
    """F(x; c_noise) = k(c_noise) x with a stated k: whatever a network of that form can do."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x, c_noise):
        return self.factor(c_noise).to(x.dtype).reshape(-1, 1, 1, 1) * x


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_posterior_mean_minimises_the_loss(name):
    objective, truth = OBJECTIVES[name], Gaussian(std=0.5)
    image, u, noise = draws(4096)

    def loss(change):
        return objective.loss(
            lambda x, sigma: truth.denoise(x, sigma.float()) * (1 + change), image, u, noise
        ).mean()

    best = loss(0.0)
    assert best < loss(0.02)
    assert best < loss(-0.02)


def test_the_edm_loss_of_the_perfect_denoiser_is_the_known_one():
    # With sd = 0.5 = std the posterior variance is sigma^2 sd^2 / (sigma^2 + sd^2), so the weight
    # makes it 1 in every pixel: 16 a 4 x 4 image at any noise level.
    image, u, noise = draws(8192)
    truth = Gaussian(std=0.5)
    losses = EDM().loss(lambda x, s: truth.denoise(x, s.float()), image, u, noise)
    assert losses.shape == (8192,)
    # The mean of 8192 * 16 squared normals: standard error 16 sqrt(2 / 131072) = 0.06.
    assert losses.mean().item() == pytest.approx(16, abs=0.25)


def test_the_ddpm_loss_is_the_squared_error_of_the_noise():
    objective = DDPM(T=100)
    image, u, noise = draws(64)
    sigma = LinearBetas(T=100)(u)
    guess = torch.randn(noise.shape, generator=torch.Generator().manual_seed(2))
    network = Linear(lambda c: torch.zeros_like(c))
    network.forward = lambda x, c_noise: guess
    losses = objective.loss(objective.denoiser(network), image, u, noise)
    # Ho 2020, Eq. 14, mean over pixels. float32 loses sigma / |eps| digits: 6e-4 at sigma = 157.
    expected = (guess - noise).square().mean(dim=(1, 2, 3))
    assert sigma.max() > 1
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=1e-4)


def test_the_ddpm_network_is_told_its_timestep():
    seen = []
    network = Linear(lambda c: seen.append(c) or torch.zeros_like(c))
    objective = DDPM()
    image, _, noise = draws(8)
    u = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4995, 0.75, 0.9, 1.0], dtype=F64)
    objective.loss(objective.denoiser(network), image, u, noise)
    assert seen[0].tolist() == [0, 100, 200, 300, 499, 750, 900, 999]


def test_weights_are_the_published_ones():
    sigma = torch.tensor([0.002, 0.5, 1.0, 80.0], dtype=F64)
    expected = torch.tensor([250004, 8, 5, 4.0001562], dtype=F64)
    torch.testing.assert_close(UnitOutput(0.5)(sigma), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(EpsWeight()(sigma), sigma**-2)


def test_unit_output_weights_the_network_error_by_one():
    sigma = torch.logspace(-3, 2, 20, dtype=F64)
    torch.testing.assert_close(
        UnitOutput(0.7)(sigma) * Karras(0.7)(sigma).c_out ** 2, torch.ones(20, dtype=F64)
    )


def test_edm_takes_the_std_of_the_data_everywhere():
    sigma = torch.tensor([0.1, 0.7, 5.0], dtype=F64)
    objective = EDM(sigma_data=0.7)
    c = objective.preconditioning(sigma)
    torch.testing.assert_close(objective.weight(sigma) * c.c_out**2, torch.ones(3, dtype=F64))
    assert c.c_skip[1].item() == pytest.approx(0.5)


def test_karras_keeps_the_network_at_unit_variance():
    sigma = torch.logspace(-3, 2, 20, dtype=F64)
    c = Karras(0.5)(sigma)
    torch.testing.assert_close(c.c_in**2 * (0.25 + sigma**2), torch.ones(20, dtype=F64))
    # Var of the target (x - c_skip noisy) / c_out, noisy = x + sigma eps.
    target = ((1 - c.c_skip) ** 2 * 0.25 + c.c_skip**2 * sigma**2) / c.c_out**2
    torch.testing.assert_close(target, torch.ones(20, dtype=F64))


def test_pooling_is_a_sum_and_a_mean():
    error = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert pixel_sum(error).tolist() == [506, 3818]
    assert pixel_mean(error).tolist() == pytest.approx([506 / 12, 3818 / 12])


def test_a_denoiser_answers_in_float32_and_takes_one_level_for_all():
    network = Linear(lambda c: torch.ones_like(c))
    denoiser = Denoiser(network, Karras(0.5))
    x = torch.randn(3, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    one = denoiser(x, torch.tensor(0.7, dtype=F64))
    each = denoiser(x, torch.full((3,), 0.7, dtype=F64))
    assert one.dtype == torch.float32
    assert torch.equal(one, each)


class TwoAnswers(nn.Module):
    """1 with a label, 0 without."""

    def forward(self, x, sigma, label):
        return (label >= 0).to(x.dtype).reshape(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_guidance_extrapolates_from_no_label_to_the_label(weight):
    label = torch.tensor([3, 1])
    guided = classifier_free(TwoAnswers(), condition={"label": label}, weight=weight)
    answer = guided(torch.zeros(2, 1, 2, 2), torch.tensor(1.0))
    assert torch.equal(answer, torch.full((2, 1, 2, 2), weight))


def test_clipping_keeps_images_in_range():
    x = torch.tensor([-3.0, 0.2, 3.0]).reshape(1, 1, 3, 1)
    answer = clipped(lambda x, sigma: x)(x, torch.tensor(1.0))
    assert answer.flatten().tolist() == pytest.approx([-1, 0.2, 1])


class Twice(nn.Module):
    """A network of 2 C channels: the image's prediction, then what it says of the variance."""

    def forward(self, x, c_noise):
        return torch.cat([torch.zeros_like(x), torch.full_like(x, 7.0)], dim=1)


def test_the_variance_is_given_when_asked_for_and_left_as_it_is():
    denoiser = Denoiser(Twice(), Karras(0.5))
    x, sigma = torch.full((2, 3, 4, 4), 8.0), torch.tensor([0.5, 0.5])
    assert torch.equal(denoiser(x, sigma), x / 2)
    both = clipped(denoiser)(x, sigma, variance=True)
    assert torch.equal(both[:, :3], torch.ones(2, 3, 4, 4))
    assert torch.equal(both[:, 3:], torch.full((2, 3, 4, 4), 7.0))


def test_a_network_without_a_variance_says_so():
    denoiser = Denoiser(Linear(lambda c: c), Karras(0.5))
    with pytest.raises(ValueError, match="3 output channels, 6 are needed"):
        denoiser(torch.zeros(1, 3, 4, 4), torch.ones(1), variance=True)
