"""A picture is its pixels and its orientation: whatever else its file says, it is read."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from prepared import file, fill, members, noise, pixels, prepare

from diffusion_pl.data.decode import decode
from diffusion_pl.data.folder import ImageFolder

STORED = noise(1, 12, 9)
UPRIGHT = {
    "png": np.asarray(STORED),
    "jpeg": np.asarray(Image.open(io.BytesIO(file(STORED, "JPEG", quality=92)))),
}
TURNED = {kind: np.rot90(array, -1) for kind, array in UPRIGHT.items()}  # orientation 6


def _chunk(kind: bytes, body: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + check


def _png(*chunks: bytes, behind: bytes = b"") -> bytes:
    """Chunks go before the pixels, `behind` after them."""
    data = file(STORED)
    return data[:33] + b"".join(chunks) + data[33:-12] + behind + data[-12:]


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def _jpeg(*segments: bytes) -> bytes:
    data = file(STORED, "JPEG", quality=92)
    return data[:2] + b"".join(segments) + data[2:]


def _tiff(*entries: tuple[int, int, int, bytes], order: str = "<", tail: bytes = b"") -> bytes:
    head = b"II*\0" if order == "<" else b"MM\0*"
    body = struct.pack(order + "IH", 8, len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(order + "HHI", tag, kind, count) + value
    return head + body + struct.pack(order + "I", 0) + tail


SIX = (0x112, 3, 1, struct.pack("<HH", 6, 0))
RATIONAL = (0x11A, 5, 1, struct.pack("<I", 8 + 2 + 24 + 4))
BY_ZERO = _tiff(SIX, RATIONAL, tail=struct.pack("<II", 1, 0))
XMP = b'<x:xmpmeta><d rdf:about="" tiff:Orientation="6">\xa8\xfe caf\xe9</d></x:xmpmeta>'
BIG = _tiff((0x112, 3, 1, struct.pack(">HH", 6, 0)), order=">")
OLD = b"\nexif\n%d\n" % (len(_tiff(SIX)) + 6) + (b"Exif\0\0" + _tiff(SIX)).hex().encode()

EXIF = b"Exif\0\0"
PLAIN = {  # read as it is stored
    "a comment of 2 MB": _png(_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 * 1024**2)))),
    "behind the pixels": _png(behind=_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3 << 20)))),
    "a profile of 2 MB": _png(_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2 * 1024**2)))),
    "a profile that is none": _png(_chunk(b"iCCP", b"p\0\0not deflated")),
    "a thousand comments": _png(*[_chunk(b"tEXt", b"a\0" + bytes(99_000))] * 800),
    "a damaged comment": _png(_chunk(b"tEXt", b"a\0b")[:-1] + b"?"),
    "EXIF that is none": _png(_chunk(b"eXIf", b"nothing")),
    "a text that is none": _png(_chunk(b"iTXt", b"Title\0\0\0\xff\0\xfe\0\xa8")),
    "a time that is none": _png(_chunk(b"tIME", b"?"), _chunk(b"pHYs", b"?")),
    "a segment of garbage": _jpeg(_segment(0xE1, EXIF + b"garbage"), _segment(0xE2, b"MPF\0??")),
    "EXIF cut off": _jpeg(_segment(0xE1, EXIF + _tiff(SIX)[:14])),
    "EXIF that is empty": _jpeg(_segment(0xE1, EXIF)),
    "a word as orientation": _jpeg(_segment(0xE1, EXIF + _tiff((0x112, 2, 2, b"6\0\0\0")))),
    "orientation 0": _jpeg(_segment(0xE1, EXIF + _tiff((0x112, 3, 1, bytes(4))))),
    "orientation 9": _jpeg(_segment(0xE1, EXIF + _tiff((0x112, 3, 1, b"\x09\0\0\0")))),
    "a directory beyond the end": _jpeg(_segment(0xE1, EXIF + b"II*\0\xff\xff\xff\xff")),
    "Photoshop's block": _jpeg(_segment(0xED, b"Photoshop 3.0\08BIM\x04\x04\0\0\xff\xff\xff\xff")),
    "profile parts out of order": _jpeg(_segment(0xE2, b"ICC_PROFILE\0\x03\x02abc")),
    "a comment": _jpeg(_segment(0xFE, b"\xff\xda\xff\xd9")),
}
ORIENTED = {  # turned by a quarter
    "a quotient by zero": _jpeg(_segment(0xE1, EXIF + BY_ZERO)),
    "the header twice": _jpeg(_segment(0xE1, EXIF + EXIF + _tiff(SIX))),
    "the other order of bytes": _jpeg(_segment(0xE1, EXIF + BIG)),
    "fill bytes": _jpeg(b"\xff", _segment(0xE1, EXIF + _tiff(SIX))),
    "XMP in another encoding": _jpeg(_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
    "PNG: a quotient by zero": _png(_chunk(b"eXIf", BY_ZERO)),
    "PNG: XMP": _png(_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "PNG: in hexadecimal": _png(_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(OLD))),
}


@pytest.mark.parametrize("name", [*PLAIN, *ORIENTED])
def test_metadata_is_no_damage(name):
    """And no warning either, which some programs make an error of."""
    data = PLAIN.get(name) or ORIENTED[name]
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.asarray(decode(data, where="x"))
    assert np.array_equal(found, (UPRIGHT if name in PLAIN else TURNED)[kind])


def test_webp_is_turned_by_its_exif():
    exif = Image.Exif()
    exif[0x112] = 6
    data = file(STORED, "WEBP", lossless=True, exif=exif)
    assert np.array_equal(np.asarray(decode(data, where="x")), TURNED["png"])
    broken = file(STORED, "WEBP", lossless=True, exif=b"garbage")
    assert np.array_equal(np.asarray(decode(broken, where="x")), UPRIGHT["png"])


def test_what_changes_pixels_is_kept():
    """Transparency, palettes, Adobe's colours and the word that a file is animated."""
    grey = Image.fromarray(np.array([[5, 9]], np.uint8))
    info = PngInfo()
    info.add_text("a", "b")
    assert np.asarray(decode(file(grey, transparency=5, pnginfo=info), where="x"))[0, 0, 0] == 255
    inks = file(Image.new("CMYK", (8, 8), (0, 0, 255, 0)), "JPEG", quality=100, comment=b"x")
    assert np.abs(np.asarray(decode(inks, where="x"))[0, 0] - np.array([255, 255, 0])).max() <= 3
    moving = file(noise(0), save_all=True, append_images=[noise(1)], pnginfo=info)
    with pytest.raises(ValueError, match="x: animated"):
        decode(moving, where="x")


def test_pictures_with_odd_metadata_are_a_set(tmp_path):
    """End to end, and the shards hold what the pictures show."""
    source = fill(tmp_path / "x", {f"{i:02}.jpg": data for i, data in enumerate(PLAIN.values())})
    assert prepare(source, tmp_path / "dest", "--fit", "pad", resolutions="12") == 0
    found = members(tmp_path / "dest")
    assert len([name for name in found if name.endswith(".png")]) == len(PLAIN)
    assert np.array_equal(
        pixels(found["000000000.12.png"])[:, 1:10], UPRIGHT["png"].transpose(2, 0, 1)
    )


# 16 bits.


def _ramp(low: int, high: int, colour: bool = False) -> bytes:
    """A PNG of 16 bits with values from low to high."""
    values = np.linspace(low, high, 64).round().astype(">u2").reshape(8, 8)
    planes = np.repeat(values[:, :, None], 3, axis=2) if colour else values
    rows = b"".join(b"\0" + row.tobytes() for row in planes)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2 if colour else 0, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("low", "high", "colour", "said"),
    [
        (0, 65_535, False, None),
        (0, 65_535, True, None),
        (0, 4_095, False, "values from 0 to 4,095 of 0 to 65,535 and become levels 0 to 16"),
        (0, 255, False, "values from 0 to 255 of 0 to 65,535 and become levels 0 to 1 of 255"),
        (31_768, 33_768, False, "values from 31,768 to 33,768 of"),
        (0, 4_095, True, "values from 0 to 4,095 of"),
    ],
)
def test_16_bits_of_which_a_fraction_is_used_get_one_line(
    low, high, colour, said, tmp_path, capsys
):
    source = fill(tmp_path / "x", {f"{i}.png": _ramp(low, high, colour) for i in range(3)})
    words = ("--shard-images", 1, "--workers", 2)
    for _ in range(2):  # the finished set says it too
        assert prepare(source, tmp_path / "dest", *words) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "16 bits" in line]
        assert len(lines) == (said is not None)
        assert said is None or f"3 images of 16 bits hold {said}" in lines[0]
    notes = json.loads((tmp_path / "dest" / "dataset.json").read_bytes()).get("notes")
    assert (notes is None) == (said is None)
    # As a source of training the same.
    ImageFolder(str(source), 8).open()
    assert (f"hold {said}" in capsys.readouterr().err) if said else not capsys.readouterr().err


def test_one_image_that_uses_the_range_is_enough(tmp_path, capsys):
    source = fill(tmp_path / "x", {"a.png": _ramp(0, 900), "b.png": _ramp(0, 60_000)})
    assert prepare(source, tmp_path / "dest", "--shard-images", 1) == 0
    assert "16 bits" not in capsys.readouterr().err
