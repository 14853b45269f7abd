"""Positions: coordinates resized with the image, then encoded."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion_pl.networks.position import PositionEncoding, coordinates


def test_coordinates_are_the_full_grid_resized_by_area():
    full = torch.arange(256, dtype=torch.float64) / 255
    for size, first, spacing in ((64, 0.00588235, 0.01568627), (128, 0.00196078, 0.00784314)):
        rows, columns = coordinates(size, size, 256).double()
        assert rows[0, 0].item() == pytest.approx(first, abs=1e-8)
        assert (rows[1, 0] - rows[0, 0]).item() == pytest.approx(spacing, abs=1e-7)
        area = F.avg_pool1d(full[None, None], 256 // size)[0, 0]
        torch.testing.assert_close(rows[:, 3], area, rtol=0, atol=1e-7)
        torch.testing.assert_close(columns[3], area, rtol=0, atol=1e-7)


def test_a_crop_of_the_encoding_is_the_encoding_of_the_crop():
    encode = PositionEncoding(4, 32)
    x, position = torch.randn(2, 3, 16, 16), coordinates(16, 16, 32)
    window = (slice(3, 11), slice(5, 13))
    whole = encode(x, None)
    assert whole.shape == (2, 3 + 16, 16, 16)
    cropped = encode(x[:, :, *window], position[:, *window])
    torch.testing.assert_close(whole[:, :, *window], cropped)
    batch = position[:, *window].expand(2, -1, -1, -1)
    torch.testing.assert_close(encode(x[:, :, *window], batch), cropped)
    # Wide images too, and in the image's own precision.
    wide = x[:, :, :8]
    assert torch.equal(encode(wide, None), encode(wide, coordinates(8, 16, 32)))
    assert encode(x.bfloat16(), None).dtype == torch.bfloat16


def test_octaves_are_sines_and_cosines_of_doubling_frequency():
    position = torch.tensor([0.3, 0.8]).reshape(2, 1, 1)
    encoded = PositionEncoding(3, 8)(torch.zeros(1, 1, 1, 1), position).flatten()[1:]
    expected = [f(math.pi * 2**k * c) for f in (math.sin, math.cos) for k in range(3)
                for c in (0.3, 0.8)]  # fmt: skip
    assert encoded.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_image_comes_first_and_the_channels_behind_it_are_counted():
    encoding = PositionEncoding(position_frequencies=3, frame=8)
    image = torch.randn(2, 3, 8, 8)
    appended = encoding(image, None)
    assert torch.equal(appended[:, :3], image)
    assert appended.shape[1] - 3 == encoding.channels == 12


def test_a_position_that_nobody_reads_is_refused():
    encode = PositionEncoding(0, 8)
    x = torch.zeros(1, 3, 8, 8)
    assert encode(x, None) is x
    with pytest.raises(ValueError, match="position_frequencies: 0"):
        encode(x, coordinates(8, 8, 8))
