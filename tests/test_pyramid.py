"""The pyramid on a Gaussian with a known spectrum, whose coarser versions are Gaussian too."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.recording import Counted
from diffusion_pl.diffusion.resizing import resized
from diffusion_pl.diffusion.schedules import LogUniform, Rho
from diffusion_pl.diffusion.spacings import DDIMUniform
from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.objectives.edm_iddpm import RoundedRho
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.deis import deis
from diffusion_pl.samplers.dpm_solver import dpmpp_2m
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.pyramid import PyramidSampler, nearest_level
from diffusion_pl.samplers.sampler import Sampler, check_range

F64 = torch.float64
FULL = 8  # pixels a side of the fine images
EDM = Sampler(heun, Rho(0.002, 80.0), 40)
TABLE = LinearBetas(100, 1e-3, 0.2)
DDPM = Sampler(partial(ancestral, variance="small"), TABLE, 100, unit_start=True)
SIMPLE = Sampler(euler, LogUniform(0.01, 40.0), 30, clip_denoised=True, unit_start=True)


class Spectrum:
    """x ~ N(mean, Sigma) on the fine grid, Sigma = exp(-distance / length) / 4: smooth images."""

    def __init__(self, mean=0.0, length=6.0):
        self.mean = mean
        place = torch.arange(FULL, dtype=F64)
        rows, columns = (axis.flatten() for axis in torch.meshgrid(place, place, indexing="ij"))
        apart = torch.hypot(rows[:, None] - rows, columns[:, None] - columns)
        self.covariance = torch.exp(-apart / length) / 4
        self.decomposed = {}

    def reducing(self, side):
        """A, from the fine grid's pixels to those of a smaller one: (side^2, FULL^2)."""
        basis = torch.eye(FULL**2, dtype=F64).reshape(-1, 1, FULL, FULL)
        return resized(basis, (side, side)).flatten(1).T

    def at(self, side):
        """The covariance of the images of a size: that of A x."""
        A = self.reducing(side)
        return A @ self.covariance @ A.T

    def spectrum(self, side):
        """The eigenvalues and eigenvectors of the covariance of a size."""
        if side not in self.decomposed:
            self.decomposed[side] = torch.linalg.eigh(self.at(side))
        return self.decomposed[side]

    def denoise(self, x, sigma):
        """The posterior mean of images of any size."""
        values, vectors = self.spectrum(x.shape[-1])
        along = (x.flatten(1).to(F64) - self.mean) @ vectors
        return self.mean + (along * values / (values + sigma**2) @ vectors.T).reshape(x.shape)

    def flow(self, side, sigma):
        """The flow's linear map of (x - mean) from a level to the image."""
        values, vectors = self.spectrum(side)
        return vectors * (values / (values + sigma**2)).sqrt() @ vectors.T


def zeros(like):
    return torch.zeros_like(like)


def noise_of(count=2, side=FULL, channels=1):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def response(pyramid, data):
    """How the result, less its mean, answers the fine noise and the coarse noise: two matrices."""
    small = pyramid.sizes(FULL, FULL)[0][0] ** 2
    fine = torch.eye(FULL**2, dtype=F64).reshape(-1, 1, FULL, FULL)
    to_fine = pyramid(data.denoise, fine, zeros).flatten(1).T - data.mean

    def coarse(like):
        assert like.shape[-1] ** 2 == small
        return torch.eye(small, dtype=like.dtype).reshape(like.shape)

    rest = torch.zeros(small, 1, FULL, FULL, dtype=F64)
    to_coarse = pyramid(data.denoise, rest, coarse).flatten(1).T - data.mean
    return to_fine.to(F64), to_coarse.to(F64)


def covariance(matrices):
    return sum(matrix @ matrix.T for matrix in matrices)


def apart(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("restart", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("kernel", ["area", "bicubic"])
def test_two_sizes_end_in_the_covariance_that_the_restart_allows(kernel, restart):
    """F (U A Sigma A' U' + sigma^2) F', with A reducing, U enlarging and F the flow."""
    data = Spectrum()
    base = Sampler(heun, Rho(0.002, 80.0), 160)
    pyramid = PyramidSampler(base, [4, 8], restart, by="sigma", enlarge=kernel)
    basis = torch.eye(16, dtype=F64).reshape(-1, 1, 4, 4)
    U = resized(basis, (FULL, FULL), kernel).flatten(1).T
    state = U @ data.at(4) @ U.T + restart**2 * torch.eye(FULL**2, dtype=F64)
    flow = data.flow(FULL, restart)
    # Heun's error of 160 steps; of 80 it is 3e-3.
    assert apart(covariance(response(pyramid, data)), flow @ state @ flow.T) < 1e-3


def test_a_restart_above_the_missing_detail_ends_in_the_data_and_one_below_lacks_it():
    data, base = Spectrum(), Sampler(heun, Rho(0.002, 80.0), 160)
    errors = [
        apart(
            covariance(response(PyramidSampler(base, [4, 8], restart, by="sigma"), data)),
            data.covariance,
        )
        for restart in (0.02, 0.3, 6.0)
    ]
    assert errors[0] > 0.05 > errors[1] > errors[2]
    assert errors[2] < 0.002


def test_three_sizes_end_in_the_mean_and_covariance_of_the_data():
    """By drawing: ancestral steps, a table of timesteps, clipping off, a fractional factor."""
    data = Spectrum(mean=0.3)
    base = Sampler(partial(ancestral, variance="small"), LinearBetas(), 100, unit_start=True)
    pyramid = PyramidSampler(base, [3, 4, 8], [0.35, 0.3])
    count = 1000
    noise = ImageNoise(0, range(count))
    drawn = pyramid(data.denoise, noise(torch.empty(count, 1, FULL, FULL)), noise).to(F64)
    # The standard error of the mean of such images is 0.5 / sqrt(1000) = 0.016, mostly shared.
    expected = torch.full((8, 8), 0.3, dtype=F64)
    torch.testing.assert_close(drawn.mean((0, 1)), expected, rtol=0, atol=0.06)
    centred = drawn.flatten(1) - drawn.mean(0).flatten()
    # sqrt(2 / 1000) = 4.5 % a variance; the restarts leave 1.5 % of the covariance out.
    assert apart(centred.T @ centred / count, data.covariance) < 0.1


@pytest.mark.parametrize("base", [EDM, DDPM, SIMPLE], ids=["edm", "ddpm", "simple"])
@pytest.mark.parametrize("levels", [[8], [1], [1.0]])
def test_one_level_is_bit_identical_to_its_base(base, levels):
    noise = noise_of()
    one = PyramidSampler(base, levels, 0.3)(Spectrum().denoise, noise, ImageNoise(1, [0, 1]))
    assert torch.equal(one, base(Spectrum().denoise, noise, ImageNoise(1, [0, 1])))


@pytest.mark.parametrize("base", [EDM, DDPM, SIMPLE], ids=["edm", "ddpm", "simple"])
def test_a_restart_at_the_maximum_is_bit_identical_to_sampling_from_noise(base):
    noise, data = noise_of(), Spectrum()
    expected = base(data.denoise, noise, ImageNoise(1, [0, 1]))
    highest = float(base.sigmas()[0])
    for options in (
        {"restart": 1.0},
        {"restart": [0.3, 1.0]},
        {"restart": highest, "by": "sigma"},
        {"restart": highest * (1 + 1e-9), "by": "sigma"},
    ):
        pyramid = PyramidSampler(base, [2, 4, 8], **options)
        counted = Counted(data.denoise)
        assert torch.equal(pyramid(counted, noise, ImageNoise(1, [0, 1])), expected)
        whole = Counted(data.denoise)
        base(whole, noise, ImageNoise(1, [0, 1]))
        assert counted.seen == whole.seen  # what does not matter is not drawn
        assert (pyramid.steps, pyramid.cost()) == (base.steps, base.steps)


def test_a_size_in_between_may_begin_from_noise():
    data, noise = Spectrum(), noise_of()
    three = PyramidSampler(EDM, [2, 4, 8], [80.0, 0.5], by="sigma")
    two = PyramidSampler(EDM, [4, 8], 0.5, by="sigma")
    found, expected = (p(data.denoise, noise, ImageNoise(1, [0, 1])) for p in (three, two))
    assert torch.equal(found, expected)


def test_the_base_goes_on_from_exactly_the_restart_along_its_own_levels():
    asked = []

    def denoise(x, sigma):
        asked.append((x.shape[-1], float(sigma)))
        return x * 0

    base = Sampler(euler, Rho(), 18)
    own = base.sigmas()
    PyramidSampler(base, [4, 8], 1.5, by="sigma")(denoise, noise_of(), ImageNoise(0, [0, 1]))
    assert [sigma for side, sigma in asked if side == 4] == own[:-1].tolist()
    assert [sigma for side, sigma in asked if side == 8] == [1.5, *own[own < 1.5][:-1].tolist()]


def test_the_restart_is_the_enlarged_image_and_fresh_noise():
    """unit_start scales only the beginning; the noise given serves the last size."""
    states = []

    def integrate(denoise, x, sigmas, randn_like):
        states.append(x.clone())
        return torch.full_like(x, 0.5)

    for unit_start in (False, True):
        base = Sampler(integrate, Rho(), 18, unit_start=unit_start)
        pyramid = PyramidSampler(base, [4, 6, 8], [3.0, 2.0], by="sigma")
        noise = noise_of()
        pyramid(None, noise, torch.ones_like)
        smallest, between, last = states[-3:]
        scale = math.sqrt(1 + 80.0**2) if unit_start else 80.0
        assert torch.equal(smallest, torch.full((2, 1, 4, 4), scale, dtype=F64))
        torch.testing.assert_close(between, torch.full((2, 1, 6, 6), 3.5, dtype=F64))
        torch.testing.assert_close(last, 0.5 + 2 * noise.to(F64))


def test_the_restart_of_a_table_is_a_timestep():
    sigmas = TABLE.sigmas()
    # u = t / T, and between timesteps 29 and 30 the nearer.
    by_share = PyramidSampler(DDPM, [4, 8], 0.305)
    near = float(sigmas[30] * 0.4 + sigmas[29] * 0.6)
    by_sigma = PyramidSampler(DDPM, [4, 8], near, by="sigma")
    assert by_share.stages()[1].tolist() == [*sigmas[:31].flip(0).tolist(), 0]
    assert by_sigma.stages()[1].tolist() == [*sigmas[:30].flip(0).tolist(), 0]
    assert nearest_level(TABLE, float(sigmas[30] * 0.6 + sigmas[29] * 0.4)) == sigmas[30]
    rounded = RoundedRho()
    assert nearest_level(rounded, 1.0) != 1.0  # a schedule that rounds to a table is one too
    assert nearest_level(Rho(), 1.2345) == 1.2345


def test_a_share_is_the_quantile_of_the_bases_schedule():
    schedule = Rho()
    stage = PyramidSampler(EDM, [4, 8], 0.25).stages()[1]
    assert stage[0] == schedule(torch.tensor(0.25, dtype=F64))
    # A spacing that leaves the end out: what lies above its highest level is that level.
    sparse = Sampler(euler, LinearBetas(), 10, DDIMUniform())
    assert torch.equal(PyramidSampler(sparse, [4, 8], 0.95).stages()[1], sparse.sigmas())


def test_a_restart_beside_a_level_does_not_make_a_step_of_nothing():
    """A multistep rule would extrapolate over the next step from one 1e-9 of it long."""
    base = Sampler(dpmpp_2m, Rho(), 18)
    own = base.sigmas()
    near = float(own[10]) * (1 + 1e-9)
    stage = PyramidSampler(base, [4, 8], near, by="sigma").stages()[1]
    assert stage.tolist() == [near, *own[11:].tolist()]


@pytest.mark.parametrize("base", [EDM, Sampler(deis, Rho(), 18), DDPM, SIMPLE])
def test_evaluations_are_those_of_every_size(base):
    pyramid = PyramidSampler(base, [2, 4, 8], [0.6, 0.4])
    counted, seen = Counted(Spectrum().denoise), {}

    def denoise(x, sigma):
        seen[x.shape[-1]] = seen.get(x.shape[-1], 0) + 1
        return counted(x, sigma)

    pyramid(denoise, noise_of(3), ImageNoise(0, range(3)))
    lengths = [len(stage) - 1 for stage in pyramid.stages()]
    assert lengths[0] > lengths[1] > lengths[2]
    each = [2 * n - 1 for n in lengths] if base is EDM else lengths
    assert [seen[side] for side in (2, 4, 8)] == each
    assert counted.seen == 3 * sum(each)
    assert pyramid.steps == sum(lengths)
    assert pyramid.cost() == lengths[0] / 16 + lengths[1] / 4 + lengths[2]


@pytest.mark.parametrize(
    ("levels", "size", "sizes"),
    [
        ([16, 32, 64], (64, 64), [16, 32, 64]),
        ([20, 50, 64], (64, 64), [20, 50, 64]),
        ([0.25, 0.5, 1], (48, 48), [12, 24, 48]),
        ([0.3, 1], (50, 50), [15, 50]),
        ([16, 32], (32, 16), [(16, 8), (32, 16)]),
        ([16, 32], (16, 32), [(8, 16), (16, 32)]),
        ([10, 25], (15, 25), [(6, 10), (15, 25)]),
    ],
)
def test_sizes_of_any_factor(levels, size, sizes):
    wanted = [each if isinstance(each, tuple) else (each, each) for each in sizes]
    seen = []

    def denoise(x, sigma):
        seen.append(tuple(x.shape[-2:]))
        return 0.5 * x

    base = Sampler(euler, Rho(), 5)
    pyramid = PyramidSampler(base, levels, 0.5)
    assert pyramid.sizes(*size) == wanted
    drawn = pyramid(denoise, torch.zeros(1, 3, *size), torch.zeros_like)
    assert drawn.shape == (1, 3, *size) and drawn.dtype == torch.float32
    assert list(dict.fromkeys(seen)) == wanted


def test_clipping_holds_at_every_size():
    base = Sampler(euler, Rho(), 5, clip_denoised=True)
    drawn = PyramidSampler(base, [4, 8], 0.5)(lambda x, s: x * 0 + 7, noise_of(), torch.zeros_like)
    assert torch.equal(drawn, torch.ones(2, 1, 8, 8))


@pytest.mark.parametrize("base", [EDM, DDPM], ids=["edm", "ddpm"])
def test_an_image_depends_on_its_own_noise_alone(base):
    pyramid = PyramidSampler(base, [2, 5, 8], 0.4)

    def draw(indices):
        noise = ImageNoise(3, indices, "latent")(torch.empty(len(indices), 1, 8, 8))
        return pyramid(lambda x, s: 0.7 * x, noise, ImageNoise(3, indices, "sampler"))

    torch.testing.assert_close(draw([5, 0, 4])[[0, 2]], draw([5, 4]), rtol=0, atol=1e-6)


def test_a_pyramid_begun_from_a_picture_goes_on_as_from_its_own():
    data, noise = Spectrum(), noise_of()
    pyramid = PyramidSampler(EDM, [4, 8], 0.5, by="sigma")
    small = EDM(data.denoise, ImageNoise(1, [0, 1])(torch.empty(2, 1, 4, 4)), zeros)
    expected = pyramid(data.denoise, noise, ImageNoise(1, [0, 1]))
    assert torch.equal(pyramid.from_image(small, data.denoise, noise, zeros), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": [8, 4]}, r"levels must be positive and ascend \(got \[8, 4\]\)"),
        ({"levels": [4, 4, 8]}, "must be positive and ascend"),
        ({"levels": []}, "must be positive and ascend"),
        ({"levels": [0, 8]}, "must be positive and ascend"),
        ({"levels": [0.5, 8]}, "whole pixels, or shares of the full size that end in 1"),
        ({"levels": [4, 8], "restart": [0.1, 0.2]}, "each of the 1 levels after the first"),
        ({"levels": [4, 8]}, "each of the 1 levels after the first"),
        ({"levels": [4, 8], "restart": 0.5, "by": "T"}, "by must be one of share, sigma"),
        ({"levels": [4, 8], "restart": 0.5, "enlarge": "cubic"}, "enlarge must be one of area"),
    ],
)
def test_impossible_pyramids_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PyramidSampler(EDM, **options)


@pytest.mark.parametrize(
    ("restart", "by", "message"),
    [
        (1.5, "share", r"a share of the schedule, in \(0, 1\] \(got 1.5\)"),
        (0.0, "share", "in (0, 1]"),
        (81.0, "sigma", r"0\.002 to 80 \(got 81\)"),
        (0.002, "sigma", r"above the lowest and up to the highest .* \(got 0\.002\)"),
        (-1.0, "sigma", "above the lowest"),
    ],
)
def test_restarts_beyond_the_bases_levels_are_refused(restart, by, message):
    if by == "share" and restart == 0:
        message = r"in \(0, 1\] \(got 0\)"
    with pytest.raises(ValueError, match=message):
        check_range(PyramidSampler(EDM, [4, 8], restart, by=by), (0.002, 80.0))


def test_noise_of_another_size_is_refused():
    with pytest.raises(ValueError, match="ends at 16 pixels, the images have 8; set the last"):
        PyramidSampler(EDM, [4, 16], 0.5)(Spectrum().denoise, noise_of(), zeros)
    with pytest.raises(ValueError, match="not all different sizes"):
        PyramidSampler(EDM, [0.99, 1], 0.5)(Spectrum().denoise, noise_of(), zeros)
    with pytest.raises(ValueError, match="first level is 4 x 4 pixels, the image 2 x 2"):
        PyramidSampler(EDM, [4, 8], 0.5).from_image(
            torch.zeros(2, 1, 2, 2), Spectrum().denoise, noise_of(), zeros
        )


def test_a_pyramids_levels_are_held_against_the_networks():
    pyramid = PyramidSampler(EDM, [4, 8], 0.5)
    assert torch.equal(pyramid.sigmas(), EDM.sigmas())
    with pytest.raises(ValueError, match=r"noise levels 80 to 0\.002"):
        check_range(pyramid, (0.01, 100.0))
