"""Bytes to [-1, 1] and back, grids and files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_pl.images import from_bytes, grid, save_png, to_bytes

LEVELS = torch.arange(256, dtype=torch.uint8)


def test_bytes_span_minus_one_to_one():
    images = from_bytes(LEVELS)
    assert images.dtype == torch.float32
    assert (images[0], images[255]) == (-1, 1)
    torch.testing.assert_close(images, LEVELS.float() / 127.5 - 1)


def test_every_byte_survives_the_round_trip():
    assert torch.equal(to_bytes(from_bytes(LEVELS)), LEVELS)


def test_quantisation_rounds_to_the_nearest_byte_and_clips():
    step = 1 / 127.5
    values = torch.tensor([-9.0, -1 + 0.49 * step, -1 + 0.51 * step, 1 - 0.49 * step, 1.004, 9.0])
    assert to_bytes(values).tolist() == [0, 0, 1, 255, 255, 255]


def test_what_is_not_bytes_is_refused():
    with pytest.raises(ValueError, match="must be uint8"):
        from_bytes(torch.zeros(2))


def test_a_grid_shows_rows_from_left_to_right():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 2, 2)
    sheet = grid(images, columns=3, gap=1, zoom=1)
    assert sheet.shape == (3, 5, 8)
    assert sheet[0, 0].tolist() == [0, 0, 255, 1, 1, 255, 2, 2]
    assert sheet[0, 3].tolist() == [3, 3, 255, 4, 4, 255, 255, 255]


def test_small_images_are_enlarged_on_a_grid_until_they_are_seen():
    images = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8)
    sheet = grid(images)
    assert sheet.shape == (3, 72, 72)
    assert torch.equal(sheet[:, 1::3, 2::3], images[0])
    assert grid(images.repeat(1, 1, 4, 4)).shape == (3, 96, 96)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    save_png(image, tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as file:
        pixels = np.asarray(file).reshape(5, 7, channels)
    assert torch.equal(torch.from_numpy(pixels.copy()).permute(2, 0, 1), image)
