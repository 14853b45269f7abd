"""Images to noise and back, mixed and branched, and their likelihood, against closed forms."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from analytic import Gaussian, Mixture

from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.schedules import Rho, levels
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.flow_likelihood import (
    bits_per_dim,
    dequantised,
    grid,
    log_likelihood,
    rademacher,
)
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.inversion import below, branch, interpolate, invert, linear, spherical

F64 = torch.float64
DATA = Gaussian(0.1, 0.5)
IMAGE = torch.linspace(-1, 1, 32, dtype=F64).reshape(2, 1, 4, 4)
SIGMAS = levels(Rho(), 65)


def test_the_grid_of_the_likelihood_has_the_steps_that_are_said():
    sigmas = grid((0.01, 100.0), 8)
    expected = [10 ** (2 - 0.5 * step) for step in range(9)]
    torch.testing.assert_close(sigmas[:-1], torch.tensor(expected, dtype=torch.float64))
    assert sigmas[-1] == 0


# The mixture's flow is steep between its modes.
@pytest.mark.parametrize(("data", "steps", "tolerance"), [(DATA, 65, 1e-3), (Mixture(), 257, 2e-2)])
def test_inversion_is_undone_by_the_sampler(data, steps, tolerance):
    sigmas = levels(Rho(), steps)
    latent = invert(data.denoise, IMAGE, sigmas)
    again = heun(data.denoise, latent, sigmas, torch.zeros_like)
    assert (again - IMAGE).abs().max() < tolerance


def test_inversion_ends_in_the_flows_exact_latent():
    latent = invert(DATA.denoise, IMAGE, levels(Rho(), 257))
    # Relative to the latent's scale of 80; the first level, 0.002, is where the flow starts.
    exact = DATA.flow(IMAGE, 0.0, 80.0)
    assert ((latent - exact) / 80).abs().max() < 1e-3


def test_inversion_is_of_second_order_by_heun_and_first_by_euler():
    exact = DATA.flow(IMAGE, 0.0, 80.0)
    for integrate, order in ((heun, 2), (euler, 1)):
        errors = [
            float((invert(DATA.denoise, IMAGE, levels(Rho(), n), integrate) - exact).norm())
            for n in (65, 129)
        ]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_the_first_step_takes_the_slope_at_its_end():
    """x = image + sigma (image - D) / sigma; without it the state would be the image's own."""
    latent = invert(DATA.denoise, IMAGE, torch.tensor([0.4, 0.0], dtype=F64))
    moved = 2 * IMAGE - DATA.denoise(IMAGE, torch.tensor(0.4, dtype=F64))
    torch.testing.assert_close(latent, moved)


def test_levels_below_one_begin_with_it():
    assert below(torch.tensor([8.0, 4.0, 2.0, 0.0], dtype=F64), 4.0).tolist() == [4, 2, 0]
    assert below(torch.tensor([8.0, 4.0, 2.0, 0.0], dtype=F64), 5.0).tolist() == [5, 4, 2, 0]
    for level in (9.0, 2.0, 0.0):
        with pytest.raises(ValueError, match="within the sampler's, 2 to 8"):
            below(torch.tensor([8.0, 4.0, 2.0, 0.0], dtype=F64), level)


def test_the_great_circle_keeps_the_length_and_the_angles():
    first, second = torch.tensor([2.0, 0.0], dtype=F64), torch.tensor([0.0, 2.0], dtype=F64)
    shape = (1, 2, 1, 1)
    for weight in (0.0, 0.25, 0.5, 1.0):
        mixed = spherical(
            first.reshape(shape), second.reshape(shape), torch.tensor([weight], dtype=F64)
        ).flatten()
        turned = weight * math.pi / 2
        assert mixed.tolist() == pytest.approx([2 * math.cos(turned), 2 * math.sin(turned)])
    for factor in (1, 2, -1):
        other = factor * first.reshape(shape)
        same = spherical(first.reshape(shape), other, torch.tensor([0.3], dtype=F64))
        torch.testing.assert_close(same, (0.7 + 0.3 * factor) * first.reshape(shape))


def test_the_line_weighs_the_ends():
    first, second = torch.ones(3, 1, 1, 1), torch.full((3, 1, 1, 1), 5.0)
    mixed = linear(first, second, torch.tensor([0.0, 0.25, 1.0]))
    assert mixed.flatten().tolist() == [1, 2, 5]


def test_interpolation_by_the_flow_begins_and_ends_in_its_images():
    sigmas = below(SIGMAS, 10.0)
    ends = tuple(invert(DATA.denoise, IMAGE, sigmas))
    weights = torch.linspace(0, 1, 5)
    for mix in (linear, spherical):
        drawn = interpolate(DATA.denoise, ends, weights, sigmas, torch.zeros_like, mix=mix)
        torch.testing.assert_close(drawn[[0, -1]].double(), IMAGE, rtol=0, atol=1e-3)
    # A Gaussian's flow is affine, so the line between latents is the line between images.
    line = linear(
        IMAGE[:1].expand(5, -1, -1, -1), IMAGE[1:].expand(5, -1, -1, -1), weights.double()
    )
    drawn = interpolate(DATA.denoise, ends, weights, sigmas, torch.zeros_like)
    torch.testing.assert_close(drawn.double(), line, rtol=0, atol=1e-3)


def test_branches_share_what_lies_above_their_level():
    asked = []

    def denoise(x, sigma):
        asked.append((float(sigma), len(x)))
        return DATA.denoise(x, sigma)

    source = torch.Generator().manual_seed(0)
    draw = lambda like: torch.randn(like.shape, generator=source, dtype=F64)  # noqa: E731
    sigmas = levels(Rho(), 12)
    noise = 80 * ImageNoise(0, [0])(torch.empty(1, 1, 2, 2, dtype=F64))
    images = branch(denoise, noise, sigmas, 1.0, draw, draw, count=3, integrate=ancestral)
    assert [n for sigma, n in asked if sigma > 1] == [1] * sum(s > 1 for s in sigmas.tolist())
    assert {n for sigma, n in asked if sigma <= 1} == {3}
    assert images.shape == (3, 1, 2, 2)
    assert (images[0] - images[1]).abs().max() > 1e-2
    same = branch(DATA.denoise, noise, sigmas, 1.0, draw, draw, count=2, integrate=euler)
    assert torch.equal(same[0], same[1])


def gaussian_nats(x, std):
    """ln N(x; mean, std^2) over all pixels of an image, the closed form."""
    z = (x - DATA.mean).flatten(1)
    return -(z.square() / (2 * std**2) + math.log(std * math.sqrt(2 * math.pi))).sum(1)


def likelihood(sigmas=SIGMAS, probe=None, data=DATA, x=IMAGE, **options):
    return log_likelihood(data.denoise, x, sigmas, probe, **options)


def test_the_likelihood_of_a_gaussian_is_its_density():
    prior = math.sqrt(DATA.std**2 + 80.0**2)
    centred = Gaussian(0.0, 0.5)
    found = likelihood(levels(Rho(), 257), data=centred, x=IMAGE - DATA.mean, prior_std=prior)
    exact = gaussian_nats(IMAGE, math.sqrt(DATA.std**2 + 0.002**2))
    # Order 2 on 256 steps: 5e-4 nats a dimension.
    torch.testing.assert_close(found, exact, rtol=0, atol=16 * 5e-4)


def test_the_likelihood_is_of_second_order_in_the_steps():
    centred, x = Gaussian(0.0, 0.5), IMAGE - DATA.mean
    prior = math.sqrt(DATA.std**2 + 80.0**2)
    exact = gaussian_nats(IMAGE, math.sqrt(DATA.std**2 + 0.002**2))
    errors = [
        float((likelihood(levels(Rho(), n), data=centred, x=x, prior_std=prior) - exact).norm())
        for n in (65, 129)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


def test_the_prior_is_that_of_pure_noise_unless_told_otherwise():
    std = float(SIGMAS[0])
    assert torch.equal(likelihood(), likelihood(prior_std=std))
    wider = likelihood(prior_std=2 * std)
    # The latent has a square of about d sigma^2 only for data; here the closed difference counts.
    latent = log_latent()
    square = latent.flatten(1).square().sum(1) / std**2
    torch.testing.assert_close(likelihood() - wider, 16 * math.log(2) - square * 3 / 8)


def log_latent():
    """The state at the top, by the same method as the likelihood."""
    return heun(DATA.denoise, IMAGE, SIGMAS[:-1].flip(0), torch.zeros_like)


def test_a_probe_of_signs_is_exact_where_the_jacobian_is_diagonal():
    probe = rademacher(torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(0)))
    assert set(probe.flatten().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(likelihood(probe=probe), likelihood())


class Mixed:
    """A denoiser whose Jacobian is a known full matrix A at every level."""

    def __init__(self):
        source = torch.Generator().manual_seed(0)
        self.A = 0.1 * torch.randn(16, 16, generator=source, dtype=F64) + 0.5 * torch.eye(16)

    def denoise(self, x, sigma):
        return (x.flatten(1) @ self.A.T).reshape(x.shape)


def test_probes_estimate_the_trace_without_bias():
    data, sigmas = Mixed(), torch.tensor([1.0, 0.5, 0.0], dtype=F64)
    exact = likelihood(sigmas, data=data)
    source = torch.Generator().manual_seed(1)
    normal = torch.randn(4000, *IMAGE.shape[1:], generator=source, dtype=F64)
    x = IMAGE[:1].expand(4000, -1, -1, -1)
    spread = []
    for probes in (normal, rademacher(normal)):
        found = likelihood(sigmas, probe=probes, data=data, x=x)
        error = found.std() / math.sqrt(4000)
        assert abs(found.mean() - exact[0]) < 4 * error
        spread.append(float(found.std()))
    assert spread[1] < spread[0]


def test_bits_count_the_256_levels_of_an_image():
    # A density that is uniform over [-1, 1], stretched by half a bin each way, needs 8 bits.
    width = 256 / 127.5
    flat = torch.tensor([-3 * math.log(width)], dtype=F64)
    assert bits_per_dim(flat, 3).item() == pytest.approx(8)


def test_dequantised_pixels_fill_their_bins():
    image = torch.tensor([-1.0, -1 + 1 / 127.5])
    low, high = dequantised(image, torch.zeros(2)), dequantised(image, torch.ones(2))
    assert high[0].item() == pytest.approx(low[1].item())
    assert (high - low)[0].item() == pytest.approx(1 / 127.5, rel=1e-4)
    assert ((high + low) / 2).tolist() == pytest.approx(image.tolist())


def test_stochastic_integrators_interpolate_too():
    sigmas = below(SIGMAS, 3.42)
    noise = ImageNoise(0, [0, 0])
    drawn = interpolate(
        DATA.denoise, tuple(IMAGE), torch.tensor([0.3, 0.3]), sigmas, noise,
        integrate=partial(ancestral, variance="large"),
    )  # fmt: skip
    assert torch.equal(drawn[0], drawn[1])  # the same noise for every weight
