"""Measurements and the denoisers that know them, against Gaussian conditioning in closed form."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from analytic import Correlated, Gaussian, Mixture

from diffusion_pl.diffusion.inverse import (
    Isotropic,
    Jacobian,
    PointEstimate,
    posterior,
    replaced,
    solved,
)
from diffusion_pl.diffusion.measurements import BlockMean, GaussianBlur, Mask
from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.diffusion.resizing import resized
from diffusion_pl.diffusion.schedules import Rho, levels
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.deis import deis
from diffusion_pl.samplers.dpm_solver import dpmpp_2m
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.resampling import Resampled

F64 = torch.float64
SHAPE = (2, 4, 4)
SIZE = 32
KNOWN = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 1, 0]]).bool()
MEASUREMENTS = {"mask": Mask(KNOWN), "means": BlockMean(2), "blur": GaussianBlur(0.8)}


def world():
    """Smooth images of two channels that know of one another, brighter to the right."""
    place = torch.cartesian_prod(torch.arange(4), torch.arange(4)).to(F64)
    smooth = torch.exp(-torch.cdist(place, place) / 2)
    channels = torch.tensor([[0.25, 0.1], [0.1, 0.16]], dtype=F64)
    mean = torch.linspace(-0.5, 0.5, 4, dtype=F64).expand(SHAPE)
    return Correlated(mean, torch.kron(channels, smooth))


def alike():
    """Independent pixels of variance 0.09, about the same means."""
    return Correlated(world().mean, 0.09 * torch.eye(SIZE, dtype=F64))


def matrix_of(measurement):
    """A, row by row, of the flattened image."""
    basis = torch.eye(SIZE, dtype=F64).view(SIZE, *SHAPE)
    return measurement.forward(basis).flatten(1).T


def measured_of(measurement, std, seed=0):
    """A measurement of an image that is not from the distribution."""
    source = torch.Generator().manual_seed(seed)
    image = torch.rand(1, *SHAPE, generator=source, dtype=F64) * 2 - 1
    y = measurement.forward(image)
    return y + std * torch.randn(y.shape, generator=source, dtype=F64)


def affine(sample):
    """An affine map of images: its matrix and its value at 0, both of flattened images."""
    states = torch.cat([torch.zeros(1, SIZE, dtype=F64), torch.eye(SIZE, dtype=F64)])
    values = sample(states.view(-1, *SHAPE)).flatten(1)
    return (values[1:] - values[0]).T, values[0]


# Measurements.


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_adjoint_is_the_transpose(name, dtype):
    measurement = MEASUREMENTS[name]
    source = torch.Generator().manual_seed(1)
    x = torch.randn(2, *SHAPE, generator=source, dtype=dtype)
    measured = measurement.forward(x)
    y = torch.randn(measured.shape, generator=source, dtype=dtype)
    back = measurement.adjoint(y)
    assert (measured.dtype, back.dtype, back.shape) == (dtype, dtype, x.shape)
    one, other = ((a * b).sum().item() for a, b in ((measured, y), (x, back)))
    assert one == pytest.approx(other, rel=1e-5 if dtype == torch.float32 else 1e-13)
    assert abs(one) > 0.1


def test_a_mask_keeps_what_is_known():
    x = torch.rand(2, *SHAPE) + 1
    kept = Mask(KNOWN).forward(x)
    assert torch.equal(kept[..., KNOWN], x[..., KNOWN])
    assert not kept[..., ~KNOWN].any()


def test_block_means_are_area_means():
    x = torch.rand(2, 3, 6, 12, dtype=F64)
    torch.testing.assert_close(BlockMean(3).forward(x), resized(x, (2, 4)))


def test_a_blur_is_a_gaussian_and_keeps_the_mean():
    blur = GaussianBlur(1.5)
    point = torch.zeros(1, 1, 33, 33, dtype=F64)
    point[..., 16, 16] = 1
    spread = blur.forward(point)[0, 0]
    offset = torch.arange(-16, 17, dtype=F64)
    assert spread.sum().item() == pytest.approx(1, abs=1e-12)
    # Cut at 4 std: 6e-5 of the weight and 1e-3 of the variance are missing.
    assert (spread.sum(0) * offset.square()).sum().item() == pytest.approx(2.25, rel=2e-3)
    bell = torch.exp(-offset.square() / 4.5)
    torch.testing.assert_close(spread.sum(1)[10:23], (bell / bell.sum())[10:23], rtol=1e-3, atol=0)
    # Mirrored edges: a flat image stays flat, and an image at the edge loses no light.
    flat = torch.full((1, 1, 5, 7), 0.3, dtype=F64)
    torch.testing.assert_close(blur.forward(flat), flat)
    edge = torch.rand(1, 2, 5, 7, dtype=F64)
    assert blur.forward(edge).sum().item() == pytest.approx(edge.sum().item())
    mirrored = torch.cat([edge.flip(-1), edge, edge.flip(-1)], -1)
    mirrored = torch.cat([mirrored.flip(-2), mirrored, mirrored.flip(-2)], -2)
    middle = blur.forward(mirrored)[..., 5:10, 7:14]
    torch.testing.assert_close(blur.forward(edge), middle)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockMean(0), "times must be at least 1"),
        (lambda: BlockMean(3).forward(torch.zeros(1, 1, 4, 4)), "do not divide an image of 4 x 4"),
        (lambda: BlockMean(8).forward(torch.zeros(1, 1, 4, 4)), "do not divide an image of 4 x 4"),
        (lambda: GaussianBlur(0.0), "std of a blur must be positive"),
        (lambda: Isotropic(0.0), "sigma_data must be positive"),
        (lambda: Isotropic(iterations=0), "iterations must be positive"),
        (lambda: Jacobian(0), "iterations must be positive"),
        (lambda: Resampled(heun, 0), "repeats and jump must be at least 1"),
        (lambda: Resampled(heun, 1, 0), "repeats and jump must be at least 1"),
        (lambda: given(std=-1.0), "std of the measurement must be 0 or more"),
        (lambda: given(std=float("nan")), "std of the measurement must be 0 or more"),
        (lambda: given(covariance=PointEstimate()), "needs the noise of the measurement"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def given(**more):
    return posterior(world().denoise, Mask(KNOWN), torch.zeros(1, *SHAPE), **more)


# The denoiser of p(x | y).


def exact(data, measurement, y, std, x, sigma):
    """E[x | x_t, y], by adding up precisions: nothing of the formula under test."""
    matrix, prior = matrix_of(measurement), torch.linalg.inv(data.covariance)
    eye = torch.eye(SIZE, dtype=F64)
    precision = prior + eye / sigma**2 + matrix.T @ matrix / std**2
    known = prior @ data.mean.flatten() + y.flatten() @ matrix / std**2
    return torch.linalg.solve(precision, (known + x.flatten(1) / sigma**2).T).T.view_as(x)


@pytest.mark.parametrize("sigma", [0.02, 0.5, 20.0])
@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize(
    ("data", "covariance"),
    [(world(), Jacobian(64)), (alike(), Jacobian(64)), (alike(), Isotropic(0.3))],
    ids=["Jacobian", "Jacobian, independent", "Isotropic, independent"],
)
def test_the_denoiser_is_the_mean_given_both(data, covariance, name, sigma):
    measurement, std = MEASUREMENTS[name], 0.1
    y = measured_of(measurement, std)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=F64) * (1 + sigma)
    informed = posterior(data.denoise, measurement, y, std=std, covariance=covariance)
    found = informed(x, torch.tensor(sigma, dtype=F64))
    torch.testing.assert_close(
        found, exact(data, measurement, y, std, x, sigma), rtol=1e-7, atol=1e-7
    )


def test_what_is_measured_without_noise_is_met():
    x = torch.randn(3, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(3))
    for measurement in (Mask(KNOWN), BlockMean(2)):
        y = measured_of(measurement, 0.0)
        for data, covariance in ((world(), Jacobian(64)), (alike(), Isotropic(0.3))):
            informed = posterior(data.denoise, measurement, y, covariance=covariance)
            found = informed(x, torch.tensor(0.7, dtype=F64))
            torch.testing.assert_close(measurement.forward(found), y.expand(3, -1, -1, -1))


def test_a_point_estimate_is_the_gradient_of_the_likelihood_of_the_denoised():
    """D + sigma^2 grad log N(y; A D, std^2), the gradient by finite differences."""
    data, measurement, std, sigma = Mixture(), GaussianBlur(0.8), 0.3, torch.tensor(0.4, dtype=F64)
    y = measured_of(measurement, std)
    x = torch.randn(1, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(4))

    def log_likelihood(state):
        error = y - measurement.forward(data.denoise(state, sigma))
        return -error.square().flatten(1).sum(1) / (2 * std**2)

    step = 1e-5 * torch.eye(SIZE, dtype=F64).view(SIZE, *SHAPE)
    slope = (log_likelihood(x + step) - log_likelihood(x - step)) / 2e-5
    informed = posterior(data.denoise, measurement, y, std=std, covariance=PointEstimate())
    wanted = data.denoise(x, sigma) + sigma**2 * slope.view_as(x)
    torch.testing.assert_close(informed(x, sigma), wanted, rtol=1e-6, atol=1e-7)


def test_images_of_a_batch_do_not_mix_and_may_have_levels_of_their_own():
    data, measurement = world(), GaussianBlur(0.8)
    y = torch.cat([measured_of(measurement, 0.1, seed) for seed in (0, 1)])
    x = torch.randn(2, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(5))

    def denoise(noisy, sigma):
        return torch.cat([data.denoise(a[None], s) for a, s in zip(noisy, sigma, strict=True)])

    sigma = torch.tensor([0.1, 3.0], dtype=F64)
    for covariance in (Jacobian(2), Isotropic(0.3), PointEstimate()):
        both = posterior(denoise, measurement, y, std=0.1, covariance=covariance)(x, sigma)
        for i in range(2):
            own = posterior(data.denoise, measurement, y[i, None], std=0.1, covariance=covariance)
            torch.testing.assert_close(both[i, None], own(x[i, None], sigma[i]))


def test_conjugate_gradients_solve_and_stop_where_the_system_is_not_positive():
    source = torch.Generator().manual_seed(6)
    root = torch.randn(2, 6, 6, generator=source, dtype=F64)
    right = torch.randn(2, 6, generator=source, dtype=F64)
    matrices = root @ root.mT + torch.eye(6)
    found = solved(lambda v: (matrices @ v[..., None])[..., 0], right, 6)
    torch.testing.assert_close(found, torch.linalg.solve(matrices, right))
    # After one of two iterations: the step of steepest descent.
    once = solved(lambda v: (matrices @ v[..., None])[..., 0], right, 1)
    length = right.square().sum(1) / torch.einsum("bi,bij,bj->b", right, matrices, right)
    torch.testing.assert_close(once, length[:, None] * right)
    signs = torch.tensor([[1.0], [-1.0]], dtype=F64)
    found = solved(lambda v: signs * v, right, 6)
    torch.testing.assert_close(found, torch.stack([right[0], torch.zeros(6, dtype=F64)]))
    assert not solved(lambda v: v, torch.zeros(1, 6), 3).any()


# Samples.


# A blur without noise determines the image.
CASES = [
    *((heun, 65, name, std) for name in ("mask", "means") for std in (0.0, 0.1)),
    (heun, 65, "blur", 0.1),
    (deis, 65, "means", 0.0),
    (dpmpp_2m, 129, "means", 0.0),
    (Resampled(heun, 1, 64), 65, "means", 0.1),
]


@pytest.mark.parametrize(("integrate", "steps", "name", "std"), CASES)
def test_samples_have_the_mean_and_covariance_of_the_posterior(integrate, steps, name, std):
    """The flow of a Gaussian is affine: no samples are drawn, only the steps' own error is left."""
    measurement, data = MEASUREMENTS[name], world()
    y = measured_of(measurement, std)
    truth = data.given(matrix_of(measurement), y, std)
    informed = posterior(data.denoise, measurement, y, std=std, covariance=Jacobian(64))
    sigmas = levels(Rho(), steps)
    matrix, offset = affine(lambda x: integrate(informed, x, sigmas, torch.zeros_like))
    start = truth.covariance + sigmas[0] ** 2 * torch.eye(SIZE, dtype=F64)
    mean = matrix @ truth.mean.flatten() + offset
    torch.testing.assert_close(mean, truth.mean.flatten(), rtol=0, atol=2e-3)
    torch.testing.assert_close(matrix @ start @ matrix.T, truth.covariance, rtol=0, atol=2e-3)
    if std == 0:
        final = integrate(informed, 80 * torch.ones(1, *SHAPE, dtype=F64), sigmas, torch.zeros_like)
        torch.testing.assert_close(measurement.forward(final), y, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "integrate", [ancestral, partial(ancestral, variance="large"), partial(heun, S_churn=10.0)]
)
def test_stochastic_samplers_take_the_path_of_the_posteriors_own_denoiser(integrate):
    data, measurement = world(), BlockMean(2)
    y = measured_of(measurement, 0.1)
    truth = data.given(matrix_of(measurement), y, 0.1)
    informed = posterior(data.denoise, measurement, y, std=0.1, covariance=Jacobian(64))
    state = 20 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(7), dtype=F64)
    sigmas = levels(Rho(0.01, 20.0), 20)
    ends = []
    for denoise in (informed, truth.denoise):
        torch.manual_seed(8)
        ends.append(integrate(denoise, state, sigmas, torch.randn_like))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-8)


def test_what_is_called_a_heuristic_is_not_exact():
    """So that the page may say so: correlated pixels, three forms, off by a twentieth and more."""
    data, measurement = world(), Mask(KNOWN)
    y = measured_of(measurement, 0.1)
    truth = data.given(matrix_of(measurement), y, 0.1)
    sigmas = levels(Rho(), 129)
    for informed in (
        posterior(data.denoise, measurement, y, std=0.1, covariance=Isotropic(0.5)),
        posterior(data.denoise, measurement, y, std=0.1, covariance=PointEstimate()),
        replaced(data.denoise, y, KNOWN),
    ):
        matrix, _ = affine(lambda x, by=informed: heun(by, x, sigmas, torch.zeros_like))
        covariance = matrix @ matrix.T * sigmas[0] ** 2
        assert (covariance - truth.covariance).abs().max() > 0.05 * truth.covariance.abs().max()


# Replacement.


@pytest.mark.parametrize("integrate", [heun, deis, dpmpp_2m, ancestral, Resampled(heun, 3)])
def test_replaced_pixels_end_where_they_were_put(integrate):
    data = world()
    image = torch.rand(3, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(9)) * 2 - 1
    # What is below the mask does not matter.
    seen = torch.where(KNOWN, image, float("nan"))
    torch.manual_seed(1)
    state = 80 * torch.randn(3, *SHAPE, dtype=F64)
    found = integrate(
        replaced(data.denoise, seen, KNOWN), state, levels(Rho(), 20), torch.randn_like
    )
    torch.testing.assert_close(found[..., KNOWN], image[..., KNOWN], rtol=0, atol=1e-12)
    assert torch.isfinite(found).all()


def test_replaced_pixels_carry_the_noise_of_the_level():
    """Ancestral steps: known pixels at level s are the image and noise of standard deviation s."""
    image = torch.full((4000, *SHAPE), 0.5, dtype=F64)
    informed = replaced(Gaussian().denoise, image, KNOWN)
    torch.manual_seed(2)
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.4], dtype=F64)
    state = image + 10 * torch.randn_like(image)
    noise = ancestral(informed, state, sigmas, torch.randn_like)[..., KNOWN] - 0.5
    # 64,000 numbers: 0.4 / sqrt(64,000) = 0.0016 and 0.0011 standard errors.
    assert noise.mean().item() == pytest.approx(0, abs=0.008)
    assert noise.std().item() == pytest.approx(0.4, abs=0.006)


def test_replacement_is_exact_for_independent_pixels():
    data = alike()
    y = measured_of(Mask(KNOWN), 0.0)
    truth = data.given(matrix_of(Mask(KNOWN)), y, 0.0)
    sigmas = levels(Rho(), 65)
    informed = replaced(data.denoise, y, KNOWN)
    matrix, offset = affine(lambda x: heun(informed, x, sigmas, torch.zeros_like))
    start = truth.covariance + sigmas[0] ** 2 * torch.eye(SIZE, dtype=F64)
    torch.testing.assert_close(matrix @ start @ matrix.T, truth.covariance, rtol=0, atol=2e-3)
    mean = matrix @ truth.mean.flatten() + offset
    torch.testing.assert_close(mean, truth.mean.flatten(), rtol=0, atol=2e-3)


def test_resampling_brings_replacement_nearer_to_the_posterior():
    """RePaint's claim: the mean of the unknown pixels, which is affine in all noise."""
    data = world()
    y = measured_of(Mask(KNOWN), 0.0)
    truth = data.given(matrix_of(Mask(KNOWN)), y, 0.0)
    informed = replaced(data.denoise, y, KNOWN)
    sigmas, state = levels(Rho(), 33), torch.zeros(1, *SHAPE, dtype=F64)
    errors = []
    for repeats in (1, 4, 16):
        mean = Resampled(heun, repeats)(informed, state, sigmas, torch.zeros_like)
        errors.append((mean - truth.mean).abs().max().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_jump_back_adds_the_noise_that_is_missing():
    """Without a step that moves the state, all that is left is the noise of the jumps back."""

    def stay(denoise, x, sigmas, randn_like):
        return x

    sigmas = torch.tensor([5.0, 4.0, 3.0, 0.0], dtype=F64)
    drawn = []

    def ones(like):
        drawn.append(len(drawn))
        return torch.ones_like(like)

    found = Resampled(stay, 3, 2)(None, torch.zeros(1, dtype=F64), sigmas, ones)
    assert found.item() == pytest.approx(2 * 4.0 + 2 * 3.0)
    assert len(drawn) == 4


# Networks.


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    network = SongUNet(resolution=8, model_channels=8, channel_mult=[1, 2], blocks=1, classes=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Denoiser(network, Karras()).eval().requires_grad_(False)


def test_a_network_is_differentiated_within_inference_mode_too(denoiser):
    y = torch.rand(2, 3, 8, 8)
    known = torch.rand(8, 8) > 0.5
    label = torch.tensor([0, -1])
    x = torch.randn(2, 3, 8, 8, dtype=F64)
    sigma = torch.tensor(0.5, dtype=F64)
    for covariance in (Isotropic(), Jacobian(), Jacobian(3)):
        informed = posterior(denoiser, Mask(known), Mask(known).forward(y), covariance=covariance)
        outside = informed(x, sigma, label=label)
        with torch.inference_mode():
            inside = informed(x.clone(), sigma.clone(), label=label)
        assert not outside.requires_grad and outside.dtype == torch.float32
        assert torch.equal(outside, inside)
        assert (outside - denoiser(x, sigma, label=label)).abs().max() > 0.1


def test_what_a_network_says_of_the_variance_passes_through():
    def speaks(x, sigma, variance=False):
        image = Gaussian().denoise(x, sigma)
        return torch.cat([image, 2 * x], dim=1) if variance else image

    x, y = torch.randn(1, *SHAPE, dtype=F64), torch.zeros(1, *SHAPE, dtype=F64)
    sigma = torch.tensor(0.5, dtype=F64)
    for informed in (posterior(speaks, Mask(KNOWN), y), replaced(speaks, y, KNOWN)):
        found = informed(x, sigma, variance=True)
        assert torch.equal(found[:, 2:], 2 * x)
        assert torch.equal(found[:, :2], informed(x, sigma))
