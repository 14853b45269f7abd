"""The error by noise level, against the Gaussian whose best denoiser is known."""

from __future__ import annotations

import pytest
import torch

from diffusion_pl.evaluation.levels import errors_by_level

STD = 0.5
LEVELS = (0.01, 0.1, 0.5, 2.0, 40.0)


def wiener(x, sigma, **more):
    """The posterior mean of white pixels N(0, STD^2): x STD^2 / (STD^2 + sigma^2)."""
    return x * STD**2 / (STD**2 + sigma.square())


@pytest.fixture(scope="module")
def images():
    return STD * torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_best_denoiser_of_a_gaussian_leaves_the_posterior_variance(images):
    for level in errors_by_level(wiener, images, LEVELS, sigma_data=STD):
        variance = level.sigma**2 * STD**2 / (level.sigma**2 + STD**2)
        assert abs(level.error - variance) < 4 * level.standard_error
        assert level.standard_error < 0.02 * variance  # 49,152 pixels: sqrt(2 / 49152) = 0.6 %
        assert level.loss == pytest.approx(1.0, abs=0.03)


def test_every_image_has_its_own_noise_whatever_the_batch(images):
    one, other = (errors_by_level(wiener, images, LEVELS, batch_size=size) for size in (64, 7))
    assert [level.error for level in one] == pytest.approx([level.error for level in other])
    less = errors_by_level(wiener, images[:32], LEVELS)
    assert less[0].error != one[0].error


def test_labels_go_with_their_images(images):
    labels = torch.arange(64)
    seen = []

    def denoise(x, sigma, label):
        seen.append(label)
        return x

    errors_by_level(denoise, images, [1.0], condition={"label": labels}, batch_size=20)
    assert torch.equal(torch.cat(seen), labels)
