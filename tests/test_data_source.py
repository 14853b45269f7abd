"""Sources at several resolutions: the same images, smaller by exact means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_pl.data.dataset import reduced
from diffusion_pl.data.means import block_means
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.images import Images


def test_a_reduced_image_is_the_mean_of_its_blocks_rounded_to_the_nearest():
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 3, 12, 12), dtype=torch.uint8, generator=source)
    small = reduced(Images("noise-12", pixels, "f", torch.arange(5), 5), 4)
    exact = pixels.double().reshape(5, 3, 4, 3, 4, 3).mean((3, 5))
    assert (small.read(torch.arange(5)).double() - exact).abs().max() <= 0.5
    assert small.name == "noise-4"
    assert small.labels.tolist() == [0, 1, 2, 3, 4]
    assert small.fingerprint != "f"


def test_reduction_has_no_bias():
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 3, 64, 64), dtype=torch.uint8, generator=source)
    small = reduced(Images("noise", pixels, "f", None, 0), 32).read(torch.arange(50))
    # A mean of 4 levels is a tie once in 4: rounded up they would add 1/8 of a level. The rounding
    # of 153,600 means has a standard error of 0.35 / 392.
    assert float(small.double().mean() - pixels.double().mean()) == pytest.approx(0, abs=0.004)


def test_no_resolution_and_its_own_leave_images_alone():
    images = Images("n", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "f", None, 0)
    assert reduced(images, None) is images
    assert reduced(images, 8) is images


@pytest.mark.parametrize("resolution", [3, 16, 0, -4])
def test_other_fractions_are_refused(resolution):
    images = Images("n", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "f", None, 0)
    with pytest.raises(ValueError, match=f"whole fraction .got {resolution}"):
        reduced(images, resolution)


def test_synthetic_scenes_are_the_same_at_every_resolution():
    source = Synthetic(20, 64)
    whole = source.open().read(torch.arange(20)).numpy().astype(np.float64)
    small = source.open(16)
    assert small.resolution == 16
    assert small.labels.tolist() == source.open().labels.tolist()
    means = whole.reshape(20, 3, 16, 4, 16, 4).mean((3, 5))
    assert np.abs(small.read(torch.arange(20)).numpy() - means).max() < 6


def test_a_mean_half_way_between_two_levels_goes_to_the_even_one():
    # Means of 0.5, 1.5, 2.5, 254.5: rounded up they would all be brighter by half a level.
    low = torch.tensor([0, 1, 2, 254], dtype=torch.uint8)
    pairs = torch.stack([low, low + 1], dim=1)[:, None, None, :].expand(4, 1, 2, 2).contiguous()
    assert block_means(pairs, 1).flatten().tolist() == [0, 2, 2, 254]


@pytest.mark.parametrize(
    ("side", "small"),
    [
        (256, 64),
        (256, 32),
        (256, 8),
        (64, 2),
        (96, 32),
        (48, 8),
        (60, 12),
        (30, 2),
        (36, 2),
        (32, 16),
        (8, 1),
    ],
)
def test_means_are_those_of_float64_for_blocks_of_any_side(side, small):
    source = np.random.default_rng(side)
    images = source.integers(0, 256, (3, 3, side, side)).astype(np.uint8)
    images[0] = 255  # the largest sums
    block = side // small
    exact = images.reshape(3, 3, small, block, small, block).mean((3, 5), dtype=np.float64)
    found = block_means(torch.from_numpy(images), small).numpy()
    assert np.array_equal(found, np.rint(exact))  # to the even level
    # Cut out of larger images, whose rows do not follow each other.
    wide = torch.from_numpy(np.pad(images, ((0, 0), (0, 0), (0, 0), (0, 5))))[..., :side]
    assert np.array_equal(block_means(wide, small).numpy(), found)
