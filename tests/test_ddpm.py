"""DDPM's predictions, its bound and improved DDPM's variance, against Ho's own coordinates."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import Gaussian
from torch import nn
from torch.distributions import Normal, kl_divergence

from diffusion_pl.diffusion.objective import UnitOutput
from diffusion_pl.diffusion.preconditioning import Karras
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.diffusion.weights import X0Weight
from diffusion_pl.objectives.ddpm import DDPM, DDPMBound, PredictVelocity
from diffusion_pl.objectives.likelihood import (
    ReverseChain,
    decoder_nats,
    prior_bits,
    variational_bound,
)

F64 = torch.float64
LN2 = math.log(2)
TABLE = LinearBetas()


class Says(nn.Module):
    """A network with one stated answer."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, c_noise):
        return self.answer


def draws(count=32, seed=1):
    source = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (count, 1, 4, 4), generator=source) / 127.5 - 1
    noise, guess = torch.randn(2, *image.shape, generator=source)
    return image, (torch.arange(count, dtype=F64) + 0.5) / count, noise, guess


def own_target(predict, image, noise, alpha_bar):
    """What a network is to predict, in Ho's and Salimans' variables."""
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return {"noise": noise, "image": image, "velocity": alpha * noise - sigma * image}[predict]


@pytest.mark.parametrize(
    ("predict", "weight"),
    [("noise", None), ("image", X0Weight()), ("velocity", UnitOutput(1.0))],
)
def test_each_prediction_has_its_own_squared_error_as_loss(predict, weight):
    objective = DDPM(T=50, beta_T=0.2, predict=predict, weight=weight)
    image, u, noise, guess = draws()
    sigma = objective.schedule(u).float().reshape(-1, 1, 1, 1)
    target = own_target(predict, image, noise, 1 / (1 + sigma**2))
    losses = objective.loss(objective.denoiser(Says(guess)), image, u, noise)
    expected = (guess - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)  # float32 at sigma = 13


@pytest.mark.parametrize("predict", ["noise", "image", "velocity"])
def test_the_true_target_gives_the_image_and_every_network_sees_x_t(predict):
    preconditioning = DDPM(T=50, beta_T=0.2, predict=predict).preconditioning
    image, u, noise, _ = (values.to(F64) for values in draws())
    sigma = LinearBetas(50, beta_T=0.2)(u)
    c = [value.reshape(-1, 1, 1, 1) for value in preconditioning(sigma)]
    c_skip, c_out, c_in, c_noise = c
    alpha_bar = (1 / (1 + sigma**2)).reshape(-1, 1, 1, 1)
    noisy = image + sigma.reshape(-1, 1, 1, 1) * noise
    target = own_target(predict, image, noise, alpha_bar)
    torch.testing.assert_close(c_skip * noisy + c_out * target, image)
    torch.testing.assert_close(
        c_in * noisy, alpha_bar.sqrt() * image + (1 - alpha_bar).sqrt() * noise
    )
    assert c_noise.flatten().tolist() == [math.floor(50 * float(quantile)) for quantile in u]


@pytest.mark.parametrize("predict", ["noise", "image", "velocity"])
def test_the_loss_is_that_of_the_noise_unless_a_weight_is_named(predict):
    objective = DDPM(T=50, beta_T=0.2, predict=predict)
    image, u, noise, guess = draws()
    losses = objective.loss(lambda x, sigma: guess, image, u, noise)
    sigma = objective.schedule(u).float().reshape(-1, 1, 1, 1)
    believed = (image + sigma * noise - guess) / sigma
    torch.testing.assert_close(losses, (believed - noise).square().mean(dim=(1, 2, 3)))


def test_velocity_is_edm_at_unit_deviation_up_to_sign():
    sigma = torch.logspace(-2, 2, 9, dtype=F64)
    mine, karras = PredictVelocity(TABLE)(sigma), Karras(1.0)(sigma)
    torch.testing.assert_close(mine.c_skip, karras.c_skip)
    torch.testing.assert_close(mine.c_out, -karras.c_out)
    assert PredictVelocity(TABLE).sigma_range == DDPM(predict="image").preconditioning.sigma_range


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="noise, image or velocity"):
        DDPM(predict="score")
    with pytest.raises(ValueError, match="small, large or learned"):
        ReverseChain(TABLE, "medium")


def ho(table):
    """beta, alpha_bar, alpha_bar of the step before, by Ho 2020, Eq. 4."""
    alpha_bar = torch.cumprod(1 - table.betas, 0)
    return table.betas, alpha_bar, torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_a_step_costs_the_divergence_of_posterior_and_model(variance):
    table = LinearBetas(20, beta_T=0.3)
    image, _, noise, guess = (values.to(F64) for values in draws(19))
    t = torch.arange(1, 20)
    beta, alpha_bar, before = (values[t].reshape(-1, 1, 1, 1) for values in ho(table))
    said = torch.randn(image.shape, generator=torch.Generator().manual_seed(4), dtype=F64)

    def denoise(x, sigma, variance=False):
        return torch.cat([guess, said], 1) if variance else guess

    chain = ReverseChain(table, variance)
    denoised, share = chain.answer(denoise, image, t)
    # Ho 2020, Eq. 7, in x_t; Nichol & Dhariwal 2021, Eq. 15.
    x_t = alpha_bar.sqrt() * image + (1 - alpha_bar).sqrt() * noise
    first = beta * before.sqrt() / (1 - alpha_bar)
    second = (1 - before) * (1 - beta).sqrt() / (1 - alpha_bar)
    tilde = beta * (1 - before) / (1 - alpha_bar)
    fraction = {"small": 0, "large": 1, "learned": (said + 1) / 2}[variance]
    model = torch.exp(fraction * beta.log() + (1 - fraction) * tilde.log())
    divergence = kl_divergence(
        Normal(first * image + second * x_t, tilde.sqrt()),
        Normal(first * guess + second * x_t, model.sqrt()),
    )
    expected = divergence.mean(dim=(1, 2, 3)) / LN2
    torch.testing.assert_close(chain.bits(image, denoised, share, t), expected)


@pytest.mark.parametrize(
    ("variance", "published"),
    [
        ("large", {1: 0.272692, 499: 0.00550343, 999: 0.0102045}),
        ("small", {1: 0.599672, 499: 0.0055082}),
    ],
)
def test_the_bound_weighs_the_noise_error_as_published(variance, published):
    # Ho 2020, Eq. 12: beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)).
    t = torch.tensor(list(published))
    image = torch.zeros(len(t), 1, 1, 1, dtype=F64)
    sigma = TABLE.sigmas()[t].reshape(-1, 1, 1, 1)
    chain = ReverseChain(TABLE, variance)
    share = torch.full_like(sigma, {"small": 0.0, "large": 1.0}[variance])
    weight = chain.bits(image, sigma, share, t) - chain.bits(image, image, share, t)
    expected = torch.tensor(list(published.values()), dtype=F64)
    torch.testing.assert_close(weight * LN2, expected, rtol=1e-5, atol=0)


def test_the_last_decoder_has_the_published_variance():
    image, _, _, guess = (values.to(F64) for values in draws(4))
    t, near = torch.zeros(4, dtype=torch.long), image + 0.01 * guess
    for variance in ("small", "large"):
        chain = ReverseChain(TABLE, variance)
        denoised, share = chain.answer(lambda x, sigma: near, image, t)
        # beta_tilde of the second step: "fixedlarge" log variance at index 0, released code.
        expected = decoder_nats(image, near, torch.tensor(-9.816725, dtype=F64))
        bits = chain.bits(image, denoised, share, t)
        torch.testing.assert_close(bits, expected.mean(dim=(1, 2, 3)) / LN2, rtol=1e-5, atol=0)
    learned = ReverseChain(TABLE, "learned").bits(image, near, torch.ones_like(image), t)
    expected = decoder_nats(image, near, torch.tensor(1e-4, dtype=F64).log())  # beta_1
    torch.testing.assert_close(learned, expected.mean(dim=(1, 2, 3)) / LN2)


@pytest.mark.parametrize("std", [1e-3, 0.01, 0.3])
def test_the_decoder_is_a_distribution_over_bytes(std):
    values = (torch.arange(256, dtype=F64) / 127.5 - 1)[:, None]
    means = torch.tensor([-1.3, -1.0, -0.123, 0.4, 0.9991, 1.2], dtype=F64)
    nats = decoder_nats(values, means, torch.tensor(std, dtype=F64).log() * 2)
    # 256 probabilities, each raised to 1e-12 at most.
    torch.testing.assert_close(torch.exp(-nats).sum(0), torch.ones(6, dtype=F64), rtol=0, atol=1e-9)


def test_the_decoder_is_the_gaussian_of_the_bin():
    values = torch.arange(256, dtype=F64) / 127.5 - 1
    probability = torch.exp(-decoder_nats(values, torch.tensor(0.2, dtype=F64), torch.tensor(-3.0)))
    normal = Normal(torch.tensor(0.2, dtype=F64), math.exp(-1.5))
    exact = normal.cdf(values + 1 / 255) - normal.cdf(values - 1 / 255)
    # 3e-4 in the distribution function at most, over 200 bins: 2e-5 each.
    torch.testing.assert_close(probability[1:-1], exact[1:-1], rtol=0, atol=2e-5)
    assert decoder_nats(values[:1], torch.tensor(1.0), torch.tensor(-9.0)).item() == pytest.approx(
        -math.log(1e-12)
    )


def test_the_prior_costs_what_was_computed_for_the_paper():
    image = torch.full((2, 1, 2, 2), 0.5, dtype=F64)
    assert prior_bits(image, TABLE).tolist() == pytest.approx([7.3e-6] * 2, abs=5e-8)
    signal = TABLE.sigmas()[-1].square().add(1).reciprocal()
    exact = kl_divergence(Normal(signal.sqrt() * 0.9, (1 - signal).sqrt()), Normal(0.0, 1.0))
    assert prior_bits(image * 1.8, TABLE)[0].item() == pytest.approx(exact.item() / LN2, rel=1e-6)


def gaussian_bytes(count, std, pixels=8):
    source = torch.Generator().manual_seed(3)
    image = std * torch.randn(count, 1, pixels, pixels, generator=source)
    return ((image + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_bound_of_the_exact_denoiser_is_the_known_one(variance):
    table, data = LinearBetas(100, 1e-3, 0.2), Gaussian(std=0.25)
    image = gaussian_bytes(128, 0.25)
    source = torch.Generator().manual_seed(5)

    def randn_like(like):
        return torch.randn(like.shape, generator=source)

    bound = variational_bound(data.denoise, image, table, randn_like, variance=variance, clip=False)
    beta, alpha_bar, before = ho(table)
    sigma_2 = (1 - alpha_bar) / alpha_bar
    posterior = 0.0625 * sigma_2 / (0.0625 + sigma_2)  # E (D - x_0)^2
    # 8,192 squared normals: standard error sqrt(2 / 8192) = 1.6 %.
    torch.testing.assert_close(bound.image_error.mean(0), posterior, rtol=0.06, atol=0)
    torch.testing.assert_close(bound.noise_error.mean(0), posterior / sigma_2, rtol=0.06, atol=0)
    tilde = beta * (1 - before) / (1 - alpha_bar)
    model = {"small": tilde, "large": beta}[variance]
    weight = beta**2 * before / (2 * model * (1 - alpha_bar) ** 2)  # Ho 2020, Eq. 10, on x_0
    expected = (tilde / model - 1 - (tilde / model).log()) / 2 + weight * posterior
    torch.testing.assert_close(bound.terms.mean(0)[1:] * LN2, expected[1:], rtol=0.06, atol=0)
    # The entropy of the bytes, below which no model can be. 100 steps of a wrong variance cost 0.5
    # bits when it is too large, 1.6 when too small.
    entropy = math.log2(0.25 * 127.5 * math.sqrt(2 * math.pi * math.e))
    total = bound.total.mean().item()
    assert entropy < total < entropy + {"small": 1.8, "large": 0.6}[variance]


def test_the_bound_is_split_into_rate_and_distortion():
    table, data = LinearBetas(10, 1e-3, 0.9), Gaussian(std=0.25)
    image = gaussian_bytes(4, 0.25)
    bound = variational_bound(data.denoise, image, table, ImageNoise(0, range(4)))
    rate, distortion = bound.progressive_code()
    # Before anything is sent there is the prior; in the end all but L_0.
    assert rate[-1].item() == pytest.approx(bound.prior.mean().item())
    sent = bound.total - bound.terms[:, 0]
    assert rate[0].item() == pytest.approx(sent.mean().item())
    assert distortion[3].item() == pytest.approx(127.5 * bound.image_error[:, 3].mean() ** 0.5)
    assert (rate.diff() < 0).all()


def test_the_bound_does_not_depend_on_the_batch_and_clips():
    table, image = LinearBetas(5, 1e-3, 0.5), gaussian_bytes(3, 0.25)
    options = {"timesteps": table, "variance": "small"}
    denoise = Gaussian(std=0.25).denoise
    three = variational_bound(denoise, image, randn_like=ImageNoise(7, range(3)), **options)
    one = variational_bound(denoise, image[2:], randn_like=ImageNoise(7, [2]), **options)
    torch.testing.assert_close(three.total[2:], one.total)
    wild = variational_bound(lambda x, s: 3 + 0 * x, image, randn_like=torch.randn_like, **options)
    assert wild.image_error.max() <= (1 - image.double()).square().mean((1, 2, 3)).max() + 1e-6
    seen = []
    variational_bound(denoise, image, table, torch.randn_like, progress=lambda *n: seen.append(n))
    assert seen == [(n, 5) for n in range(1, 6)]


def test_the_bound_trains_by_one_term_an_image():
    objective = DDPMBound(T=8, beta_T=0.3, variance="small")
    image, _, noise, guess = draws(8)
    u = (torch.arange(8, dtype=F64) + 0.5) / 8
    denoiser = objective.denoiser(Says(nn.Parameter(guess)))
    losses = objective.loss(denoiser, image, u, noise)
    t = torch.arange(8)
    sigma = objective.schedule.sigmas().float().reshape(-1, 1, 1, 1)
    denoised = image + sigma * (noise - guess)
    expected = ReverseChain(objective.schedule, "small").bits(
        image, denoised, torch.zeros(8, 1, 1, 1), t
    )
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    losses.sum().backward()
    assert torch.isfinite(denoiser.network.answer.grad).all()
