"""Each filter is what it says, and none makes images brighter on the way."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from prepared import noise

from diffusion_pl.data.decode import fit_square
from diffusion_pl.data.reduce import FILTERS, area, box_bicubic, lanczos
from diffusion_pl.data.scenes import latents
from diffusion_pl.data.source import Images, reduced
from diffusion_pl.data.synthetic import render


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


def _block_means(image: Image.Image, side: int) -> np.ndarray:
    block = image.size[0] // side
    return _array(image).reshape(side, block, side, block, 3).mean(axis=(1, 3))


@pytest.mark.parametrize(
    ("width", "height", "size"), [(7, 5, (3, 2)), (6, 9, (4, 3)), (2, 3, (5, 4))]
)
def test_area_is_the_exact_mean_at_any_ratio(width, height, size):
    """Pixels repeated to a common grid, averaged as fractions, rounded by Python (ties to even)."""
    image = noise(0, width, height)
    fine = np.asarray(image).repeat(size[1], axis=0).repeat(size[0], axis=1)
    found = np.asarray(area(image, size))
    assert found.shape == (size[1], size[0], 3)
    for row, column, channel in np.ndindex(found.shape):
        block = fine[
            row * height : (row + 1) * height, column * width : (column + 1) * width, channel
        ]
        assert found[row, column, channel] == round(Fraction(int(block.sum()), block.size))


def test_area_rounds_ties_to_even():
    """Means of 0.5 and 1.5: half of the ties go down."""
    image = Image.fromarray(np.array([[[0] * 3, [1] * 3, [1] * 3, [2] * 3]], dtype=np.uint8))
    assert np.asarray(area(image, (2, 1)))[0, :, 0].tolist() == [0, 2]


def test_area_over_blocks_is_what_sources_do_on_the_fly():
    whole = torch.from_numpy(np.asarray(noise(1, 24, 24)).transpose(2, 0, 1).copy())[None]
    small = reduced(Images("noise", whole, "f", None, 0), 6).read(torch.tensor([0]))
    assert np.array_equal(np.asarray(area(noise(1, 24, 24), (6, 6))), small[0].permute(1, 2, 0))


def test_area_of_a_tall_image_does_not_show_how_it_is_cut_up():
    tall = noise(2, 6, 1024)
    assert (
        np.abs(
            _array(area(tall, (2, 128))) - _array(tall).reshape(128, 8, 2, 3, 3).mean((1, 3))
        ).max()
        <= 0.5
    )


def test_box_bicubic_of_a_power_of_two_is_the_mean_of_blocks():
    """Halving in float32 is exact, and bicubic at its own size changes nothing."""
    for side in (32, 16, 8):
        found = np.asarray(box_bicubic(noise(3, 64, 64), (side, side)))
        assert np.array_equal(found, np.rint(_block_means(noise(3, 64, 64), side)))


def test_box_bicubic_halves_only_while_twice_too_large():
    """100 to 40 px: means of 2 x 2, then Pillow's bicubic filter over numbers, not levels."""
    image = noise(8, 100, 100)
    halved = _block_means(image, 50).astype(np.float32)
    planes = [
        np.asarray(Image.fromarray(halved[:, :, c]).resize((40, 40), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    expected = np.rint(np.stack(planes, axis=-1)).clip(0, 255)
    assert np.array_equal(np.asarray(box_bicubic(image, (40, 40))), expected)
    # Not twice too large both ways, so not halved.
    image = noise(9, 50, 100)
    plane = Image.fromarray(_array(image)[:, :, 0].astype(np.float32))
    expected = np.asarray(plane.resize((40, 40), Image.Resampling.BICUBIC))
    found = np.asarray(box_bicubic(image, (40, 40)))[:, :, 0]
    assert np.array_equal(found, np.rint(expected).clip(0, 255))
    # Overshoot beside an edge is cut off and does not come round to the other end.
    edge = Image.fromarray(np.repeat(np.array([[[0], [255]]], np.uint8), 3, 2)).resize((50, 50), 0)
    found = _array(box_bicubic(edge, (40, 40)))
    assert found[:, :20].max() < 64 and found[:, 20:].min() > 192
    # A ramp stays a ramp: pixel k of 40 has its centre at 2.5 (k + 1/2) - 1/2 of 100.
    ramp = np.tile(np.arange(100)[None, :, None] * 2, (100, 1, 3)).astype(np.uint8)
    found = _array(box_bicubic(Image.fromarray(ramp), (40, 40)))[20, 3:-3, 0]
    exact = 2 * ((np.arange(40) + 0.5) * 2.5 - 0.5)
    # Rounding is half a level; the filter's weights at its places sum to a line only within 0.1.
    assert np.abs(found - exact[3:-3]).max() <= 0.6


def test_lanczos_is_pillows_own():
    """EDM's images were made by it, so it must not differ by a bit."""
    image = noise(4, 50, 30)
    expected = image.resize((20, 12), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(lanczos(image, (20, 12))), np.asarray(expected))


@pytest.mark.parametrize("name", FILTERS)
def test_constant_images_and_sizes_are_kept(name):
    flat = Image.new("RGB", (30, 21), (10, 200, 255))
    for size in ((7, 5), (30, 21), (40, 60)):
        found = FILTERS[name](flat, size)
        assert found.size == size and found.mode == "RGB"
        assert (np.asarray(found) == (10, 200, 255)).all()
    same = FILTERS[name](noise(5, 9, 7), (9, 7))
    assert np.array_equal(np.asarray(same), np.asarray(noise(5, 9, 7)))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("side", [128, 64, 32])
def test_no_filter_brightens_noise(name, side):
    """Within 0.05 of 255; Pillow's own 8-bit halving adds half a level each time (below)."""
    images = [noise(seed, 256, 256) for seed in range(2)]
    bias = [
        (_array(FILTERS[name](each, (side, side))) - _block_means(each, side)).mean()
        for each in images
    ]
    assert abs(np.mean(bias)) < 0.05


@pytest.mark.parametrize(
    ("name", "limit"), [("area", 0.05), ("box-bicubic", 0.05), ("lanczos", 0.1)]
)
def test_filters_keep_the_mean_of_shapes(name, limit):
    """Lanczos overshoots beside edges; of saturated colours the overshoot is cut off: 0.07."""
    images = [Image.fromarray(each.transpose(1, 2, 0)) for each in render(latents(0, 0, 16), 256)]
    for side in (128, 64, 32):
        bias = [
            _array(FILTERS[name](each, (side, side))).mean() - _array(each).mean()
            for each in images
        ]
        assert abs(np.mean(bias)) < limit


def test_pillows_8_bit_halving_is_what_must_not_be_used():
    """Why box halving is computed in float here: 1.5 levels after three halvings."""
    image = noise(6, 256, 256)
    small = image
    for side in (128, 64, 32):
        small = small.resize((side, side), Image.Resampling.BOX)
    assert (_array(small) - _block_means(image, 32)).mean() == pytest.approx(1.5, abs=0.05)


def test_fitting_uses_the_filter_that_is_given():
    wide = noise(7, 24, 12)
    crop = wide.crop((6, 0, 18, 12))
    found = fit_square(wide, 6, "crop", where="x", resize=area)
    assert np.array_equal(np.asarray(found), np.asarray(area(crop, (6, 6))))
    padded = np.asarray(fit_square(wide, 12, "pad", where="x", resize=area))
    assert np.array_equal(padded[3:9], np.asarray(area(wide, (12, 6))))
    assert (padded[:3] == 255).all() and (padded[9:] == 255).all()
