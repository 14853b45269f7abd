"""Every conversion of an image file as stated, everything doubtful refused by name."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_pl.data.decode import decode, fit_square, to_rgb


def _file(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _noise(seed: int, width: int = 8, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(data, where="x")).astype(int)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    """Pillow's own convert("RGB") turns every value above 255 white."""
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    found = _pixels(_file(Image.fromarray(values)))
    exact = values.astype(np.float64) / 257
    assert np.abs(found - exact[:, :, None]).max() <= 0.5
    # As stated for the one value that a file may call transparent: white.
    found = _pixels(_file(Image.fromarray(values), transparency=1000))
    assert found[1000 // 256, 1000 % 256].tolist() == [255, 255, 255]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_alpha_is_laid_over_white(format: str) -> None:
    """A fully transparent red pixel is white, not red."""
    rgba = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    rgba[0, 0] = (255, 0, 0, 0)
    found = _pixels(_file(Image.fromarray(rgba), format, lossless=True, exact=True))
    alpha = rgba[:, :, 3:] / 255
    assert np.abs(found - (rgba[:, :, :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert found[0, 0].tolist() == [255, 255, 255]


def test_every_kind_of_transparency_is_laid_over_white() -> None:
    grey = np.array([[[100, 0], [100, 51]]], dtype=np.uint8)
    assert _pixels(_file(Image.fromarray(grey)))[0, :, 0].tolist() == [255, 224]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert _pixels(_file(palette)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    for transparency in (0, b"\0\xff"):
        found = _pixels(_file(palette, transparency=transparency))
        assert found.tolist() == [[[255, 255, 255], [0, 0, 255]]]
    colour = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert _pixels(_file(colour, transparency=(1, 2, 3)))[0, 0].tolist() == [255, 255, 255]
    assert _pixels(_file(colour.convert("L"), transparency=5))[0, 1].tolist() == [255, 255, 255]


def test_grey_and_one_bit_become_rgb_by_repetition() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(_pixels(_file(Image.fromarray(grey))), np.stack([grey] * 3, axis=-1))
    bits = Image.fromarray(grey > 100)
    assert np.array_equal(_pixels(_file(bits))[:, :, 1], (grey > 100) * 255)


def test_cmyk_is_converted() -> None:
    """No ink is white, full black is black, full yellow has no blue; JPEG errs by a few levels."""
    inks = [(0, 0, 0, 0), (0, 0, 0, 255), (0, 0, 255, 0)]
    colours = [(255, 255, 255), (0, 0, 0), (255, 255, 0)]
    for ink, colour in zip(inks, colours, strict=True):
        found = _pixels(_file(Image.new("CMYK", (8, 8), ink), "JPEG", quality=100))
        assert np.abs(found - np.array(colour)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """The eight orientations of the EXIF standard, as turns and mirrorings of the stored pixels."""
    undo: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = _noise(0, width=5, height=3)
    found = _pixels(_file(stored, exif=exif))
    assert np.array_equal(found, undo[orientation](np.asarray(stored)))


def test_content_decides_not_a_name() -> None:
    for format in ("GIF", "BMP", "TIFF", "PPM"):
        with pytest.raises(ValueError, match="x: not a PNG, JPEG or WebP image"):
            decode(_file(_noise(0), format), where="x")


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animations_are_refused(format: str) -> None:
    data = _file(_noise(0), format, save_all=True, append_images=[_noise(1)])
    with pytest.raises(ValueError, match="x: animated"):
        decode(data, where="x")


def test_a_photograph_with_a_preview_is_the_photograph() -> None:
    """Telephones write JPEGs with further pictures behind the first."""
    photo = Image.new("RGB", (16, 8), (200, 30, 30))
    data = _file(photo, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert np.abs(_pixels(data) - np.array([200, 30, 30])).max() <= 3


@pytest.mark.parametrize("mode", ["F", "I", "HSV", "LAB"])
def test_pixels_without_a_stated_meaning_are_refused(mode: str) -> None:
    """Pillow's convert would make a float image in [0, 1] black."""
    with pytest.raises(ValueError, match=f"x: pixels of mode {mode}"):
        to_rgb(Image.new(mode, (4, 4)), where="x")


def _png_of_size(width: int, height: int) -> bytes:
    """A PNG that announces a size and has next to no contents, as a bomb has."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


@pytest.mark.parametrize(
    "size", [(8001, 8000), (10_000, 10_000), (30_000, 30_000), (16_385, 1), (1, 16_385)]
)
def test_bombs_are_refused_before_they_are_decoded(size: tuple[int, int]) -> None:
    """Decoding would find the contents missing; the complaint is of the size."""
    with pytest.raises(ValueError, match=r"x: (\d+ x \d+ pixels; at most 64 megapix|too large)"):
        decode(_png_of_size(*size), where="x")
    with pytest.raises(ValueError, match="x: broken image"):
        decode(_png_of_size(100, 100), where="x")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damage_raises_nothing_but_a_named_error(format: str) -> None:
    """A truncation is noticed where it costs a pixel; a wrong byte may leave a readable image."""
    whole = _file(_noise(0, 24, 24), format, exif=Image.Exif())
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        try:
            assert np.array_equal(_pixels(whole[:length]), _pixels(whole))
        except ValueError as error:
            assert str(error).startswith("x: ")
        else:
            assert length > len(whole) - 40  # only what follows the pixels is missing
    draw = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] = draw.randrange(256)
        try:
            decode(bytes(damaged), where="x")
        except ValueError as error:
            assert str(error).startswith("x: ")


# Fitting to a square.


def test_crop_keeps_the_central_square() -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = (10, 200, 30)
    for pixels in (wide, wide.swapaxes(0, 1)):
        square = fit_square(Image.fromarray(pixels), 5, "crop", where="x")
        assert np.array_equal(np.asarray(square), np.full((5, 5, 3), (10, 200, 30)))


def test_pad_keeps_the_whole_image_between_white() -> None:
    wide = Image.new("RGB", (40, 20), (10, 200, 30))
    pixels = np.asarray(fit_square(wide, 8, "pad", where="x"))
    assert np.all(pixels[2:6] == (10, 200, 30))
    assert np.all(pixels[:2] == 255) and np.all(pixels[6:] == 255)
    thin = fit_square(Image.new("RGB", (5000, 1)), 8, "pad", where="x")
    assert (np.asarray(thin) == 0).all(axis=(1, 2)).sum() == 1


def test_exact_changes_no_pixel_and_refuses_another_size() -> None:
    image = _noise(0)
    assert np.array_equal(np.asarray(fit_square(image, 8, "exact", where="x")), np.asarray(image))
    with pytest.raises(ValueError, match="x: 8 x 8 pixels where fit: exact needs 16 x 16"):
        fit_square(image, 16, "exact", where="x")


def test_lanczos_keeps_a_low_frequency_and_removes_a_high_one() -> None:
    """64 to 16 px: 2 periods stay as they are, 24 periods (beyond the limit of 8) turn to grey."""

    def wave(periods: int, side: int) -> np.ndarray:
        x = (np.arange(side) + 0.5) / side
        return np.tile(128 + 80 * np.sin(2 * np.pi * periods * x), (side, 1))

    for periods, expected in ((2, wave(2, 16)), (24, np.full((16, 16), 128.0))):
        rgb = np.stack([wave(periods, 64).round()] * 3, axis=-1).astype(np.uint8)
        found = np.asarray(fit_square(Image.fromarray(rgb), 16, "crop", where="x"))[:, 2:-2, 0]
        assert np.abs(found - expected[:, 2:-2]).max() <= 6


def test_an_image_far_too_small_is_refused() -> None:
    """1 x 5000 pixels cropped to a square is one pixel."""
    with pytest.raises(ValueError, match="x: 1 x 5000 pixels would be enlarged more than 4 times"):
        fit_square(Image.new("RGB", (1, 5000)), 8, "crop", where="x")
    assert fit_square(Image.new("RGB", (2, 9)), 8, "crop", where="x").size == (8, 8)
