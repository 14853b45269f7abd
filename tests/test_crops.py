"""Crops: windows anywhere in the image, whose positions are theirs in the full frame."""

from __future__ import annotations

import pytest
import torch
from loaders import loader

from diffusion_pl.data.crops import Crop
from diffusion_pl.images import Images
from diffusion_pl.positions import coordinates


def ramps(count, side, frame):
    """Images whose first two channels are 255 times their coordinates."""
    row_column = coordinates(side, side, frame)
    image = torch.cat([row_column, torch.zeros(1, side, side)]) * 255
    return image.expand(count, -1, -1, -1)


def test_a_window_has_the_coordinates_of_the_pixels_it_shows():
    pixels = torch.arange(3 * 16 * 16).remainder(251).to(torch.uint8).reshape(1, 3, 16, 16)
    image, position = Crop(5)(pixels, torch.tensor([7]), seed=3, frame=16)
    whole = coordinates(16, 16, 16)
    top, left = (round(float(position[0, axis, 0, 0]) * 15) for axis in (0, 1))
    assert torch.equal(image[0], pixels[0, :, top : top + 5, left : left + 5])
    torch.testing.assert_close(position[0], whole[:, top : top + 5, left : left + 5])


def test_a_smaller_resolution_keeps_the_coordinates_of_the_full_frame():
    image = ramps(1, 16, 64).to(torch.uint8)
    _, position = Crop(16, scale=(1.0, 1.0))(image, torch.tensor([0]), seed=0, frame=64)
    torch.testing.assert_close(position[0], coordinates(16, 16, 64))


def test_resized_windows_show_what_their_positions_say():
    image = ramps(40, 64, 64).round().to(torch.uint8)
    crop = Crop(16, scale=(0.25, 1.0))
    shown, position = crop(image, torch.arange(40), seed=1, frame=64)
    assert shown.shape == (40, 3, 16, 16)
    # Within a pixel of the window's edge the filter reaches past it.
    inner = (slice(None), slice(0, 2), slice(1, -1), slice(1, -1))
    assert (shown[inner] / 255 - position[inner]).abs().max() < 1.5 / 255
    sides = 15 / (position[:, 0, -1, 0] - position[:, 0, 0, 0])
    # Spacing of 1/63 is a window of 16 pixels, of 4/63 the whole.
    assert sides.max() < 63.01
    assert sides.min() > 63 / 4.1
    assert sides.min() < 20
    assert sides.max() > 45


def test_a_resized_window_is_antialiased():
    # One bright column in four, which lies between the points that a plain resize looks at.
    stripes = (torch.arange(64) % 4 == 0).mul(255).to(torch.uint8).expand(1, 3, 64, 64)
    image, _ = Crop(16, scale=(1.0, 1.0))(stripes, torch.tensor([0]), seed=0, frame=64)
    assert (image[..., 1:-1].float() - 255 / 4).abs().max() < 20


def test_the_largest_window_is_as_likely_as_the_smallest():
    image = torch.zeros(1000, 1, 2, 2, dtype=torch.uint8)
    _, position = Crop(1, scale=(0.5, 1.0))(image, torch.arange(1000), seed=0, frame=2)
    # The whole image is seen as one pixel in its middle.
    whole = (position.flatten(1) == 0.5).all(dim=1)
    assert whole.float().mean() == pytest.approx(0.5, abs=0.06)


def test_every_place_comes_and_rows_are_independent_of_columns():
    image = torch.zeros(4000, 1, 6, 6, dtype=torch.uint8)
    _, position = Crop(4)(image, torch.arange(4000), seed=0, frame=6)
    places = (position[:, :, 0, 0] * 5).round().long()
    counts = torch.bincount(places[:, 0] * 3 + places[:, 1], minlength=9)
    # 4,000 / 9 each, a standard deviation of 20.
    assert (counts - 4000 / 9).abs().max() < 90


def test_a_batch_flips_first_so_positions_are_those_of_the_mirrored_image():
    image = ramps(1, 16, 16).round().to(torch.uint8)
    images = {16: Images("ramp", image.expand(32, -1, -1, -1).clone(), "f", None, 0)}
    batch = loader(images, 32, hflip=True, crop=Crop(8))[0]
    column, position = batch["image"][:, 1] / 255, batch["position"][:, 1]
    flipped = column[:, 0, 0] > column[:, 0, -1]
    assert 5 < flipped.sum() < 27
    expected = torch.where(flipped[:, None, None], 1 - position, position)
    assert (column - expected).abs().max() < 0.6 / 255
    assert (position[:, 0, 1:] > position[:, 0, :-1]).all()


def test_an_image_no_larger_than_the_crop_stays_whole_and_has_no_position():
    images = {8: Images("zeros", torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "f", None, 0)}
    batch = loader(images, 4, crop=Crop(8))[0]
    assert set(batch) == {"image", "index"}


def test_a_crop_may_be_cut_without_saying_where():
    pixels = torch.arange(4 * 64).to(torch.uint8).reshape(4, 1, 8, 8)
    images = {8: Images("ramp", pixels, "f", None, 0)}
    told, untold = (
        loader(images, 4, crop=Crop(4, return_position=told))[0] for told in (True, False)
    )
    assert torch.equal(told["image"], untold["image"])
    assert "position" in told
    assert "position" not in untold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "crop.size must be at least 1"),
        ({"size": 8, "scale": (0.0, 1.0)}, "crop.scale must rise within"),
        ({"size": 8, "scale": (0.9, 0.5)}, "crop.scale must rise within"),
        ({"size": 8, "scale": (0.5, 1.1)}, "crop.scale must rise within"),
    ],
)
def test_impossible_crops_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Crop(**options)
