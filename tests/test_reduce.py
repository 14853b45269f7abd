"""Each filter is what it says, and none makes images brighter on the way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from prepared import noise

from diffusion_pl.data.dataset import reduced
from diffusion_pl.data.decode import fit_square
from diffusion_pl.data.reduce import FILTERS, area, box_bicubic, lanczos
from diffusion_pl.data.scenes import latents
from diffusion_pl.data.synthetic import render
from diffusion_pl.images import Images


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


def _pass(rows: np.ndarray, count: int, kernel: str) -> np.ndarray:
    """One pass of an antialiased filter over the last axis, in 8 bits: rounded half up, clipped.

    Written from the definition: a new pixel's weights are the kernel, widened where the image
    becomes smaller, at the old pixels' centres, and sum to one.
    """
    length = rows.shape[-1]
    scale = length / count
    wide = max(scale, 1.0)
    centre = (np.arange(count)[:, None] + 0.5) * scale
    x = np.abs((np.arange(length)[None] + 0.5 - centre) / wide)
    if kernel == "box":
        weights = ((np.arange(length)[None] + 0.5 - centre) / wide > -0.5) & (
            (np.arange(length)[None] + 0.5 - centre) / wide <= 0.5
        )
    else:  # Keys' cubic convolution, a = -1/2
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights = weights / weights.sum(axis=1, keepdims=True)
    return np.floor(rows @ weights.T + 0.5).clip(0, 255)


def _resized(
    image: np.ndarray, width: int, height: int, kernel: str, down_first: bool = False
) -> np.ndarray:
    """(H, W, 3) to (height, width, 3) in two passes; a direction that fits is left alone."""
    planes = image.transpose(2, 0, 1).astype(np.float64)
    for down in (down_first, not down_first):
        length = height if down else width
        planes = planes.swapaxes(1, 2) if down else planes
        planes = planes if planes.shape[2] == length else _pass(planes, length, kernel)
        planes = planes.swapaxes(1, 2) if down else planes
    return planes.transpose(1, 2, 0)


def _adm(image: np.ndarray, side: int, down_first: Sequence[bool]) -> np.ndarray:
    """The steps of ADM's loader, on arrays: halve, bring the shorter side to size, cut out."""
    orders = iter(down_first)
    while min(image.shape[:2]) // side >= 2:
        half = (image.shape[1] // 2, image.shape[0] // 2)
        image = _resized(image, *half, "box", next(orders))
    height, width = (round(n * (side / min(image.shape[:2]))) for n in image.shape[:2])
    image = _resized(image, width, height, "cubic", next(orders))
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def _photograph(width: int, height: int) -> Image.Image:
    """Smooth, with an edge and a little noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 90 * np.sin(x / 9 + k) * np.cos(y / 7 - k) + 30 * (x > y) for k in range(3)]
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return Image.fromarray((np.stack(waves, -1) + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "side"),
    [
        (64, 64, 16), (100, 100, 40), (79, 79, 40), (80, 80, 40), (81, 81, 40),
        (300, 127, 64), (127, 300, 64), (301, 128, 64), (333, 257, 64), (97, 513, 32),
        (50, 40, 64), (40, 31, 31), (500, 90, 64), (90, 500, 24), (64, 64, 64),
    ],
)  # fmt: skip
def test_box_bicubic_is_adms_on_every_shape(width, height, side):
    """Held against the steps above: rounding to 22 bits in Pillow moves few pixels by one level.

    Which way Pillow goes first, across or down, depends on its version and on the shape.
    """
    image = _photograph(width, height)
    found = fit_square(image, side, "crop", where="x", resize=box_bicubic)
    assert found.size == (side, side)
    halvings = max(0, (min(width, height) // side).bit_length() - 1)
    away = []
    for orders in itertools.product((False, True), repeat=halvings + 1):
        away.append(np.abs(_array(found) - _adm(np.asarray(image), side, orders)))
    nearest = min(away, key=np.sum)
    assert nearest.max() <= 1 and (nearest > 0).mean() < 0.005


def test_box_bicubic_crops_last():
    """Cropped first, an oblong image is halved at other places and ends in other pixels."""
    image = _photograph(301, 128)
    found = fit_square(image, 60, "crop", where="x", resize=box_bicubic)
    left = (301 - 128) // 2
    first = box_bicubic(image.crop((left, 0, left + 128, 128)), (60, 60))
    assert np.abs(_array(found) - _array(first)).max() > 3


@pytest.mark.parametrize(("side", "halved"), [(20, (24, 12)), (40, (48, 24)), (60, (96, 48))])
def test_box_bicubic_of_a_padded_image_keeps_the_whole(side, halved):
    """96 x 48: halved while both sides are twice too long, then resized; white around it."""
    image = np.asarray(_photograph(96, 48))
    padded = np.asarray(fit_square(_photograph(96, 48), side, "pad", where="x", resize=box_bicubic))
    while image.shape[1] > halved[0]:
        image = _resized(image, image.shape[1] // 2, image.shape[0] // 2, "box")
    orders = [_resized(image, side, side // 2, "cubic", down) for down in (False, True)]
    edge = side // 4
    inner = padded[edge : edge + side // 2].astype(float)
    assert min((np.abs(inner - each) > 0).mean() for each in orders) < 0.005
    assert (padded[:edge] == 255).all() and (padded[edge + side // 2 :] == 255).all()


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


@pytest.mark.parametrize("name", ["lanczos", "area"])
@pytest.mark.parametrize("side", [128, 64, 32])
def test_no_filter_but_adms_brightens_noise(name, side):
    """Within 0.05 of 255; Pillow's own 8-bit halving adds half a level each time (below)."""
    images = [noise(seed, 256, 256) for seed in range(2)]
    bias = [
        (_array(FILTERS[name](each, (side, side))) - _block_means(each, side)).mean()
        for each in images
    ]
    assert abs(np.mean(bias)) < 0.05


@pytest.mark.parametrize(("name", "limit"), [("area", 0.05), ("lanczos", 0.1)])
def test_filters_keep_the_mean_of_shapes(name, limit):
    """Lanczos overshoots beside edges; of saturated colours the overshoot is cut off: 0.07."""
    images = [Image.fromarray(each.transpose(1, 2, 0)) for each in render(latents(0, 0, 16), 256)]
    for side in (128, 64, 32):
        bias = [
            _array(FILTERS[name](each, (side, side))).mean() - _array(each).mean()
            for each in images
        ]
        assert abs(np.mean(bias)) < limit


def test_adms_halving_brightens_noise_as_is_stated():
    """What `area` and `lanczos` do not: 1.5 levels after three halvings, as in ADM's own data."""
    image = noise(6, 256, 256)
    small = box_bicubic(image, (32, 32))
    assert (_array(small) - _block_means(image, 32)).mean() == pytest.approx(1.5, abs=0.05)


def test_fitting_uses_the_filter_that_is_given():
    wide = noise(7, 24, 12)
    crop = wide.crop((6, 0, 18, 12))
    found = fit_square(wide, 6, "crop", where="x", resize=area)
    assert np.array_equal(np.asarray(found), np.asarray(area(crop, (6, 6))))
    padded = np.asarray(fit_square(wide, 12, "pad", where="x", resize=area))
    assert np.array_equal(padded[3:9], np.asarray(area(wide, (12, 6))))
    assert (padded[:3] == 255).all() and (padded[9:] == 255).all()
