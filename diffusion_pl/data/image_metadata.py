"""Metadata of image files: the orientation is read, everything else is removed before decoding.

Decoders stop at a damaged colour profile, garbage in EXIF or a comment of two megabytes, though the
pixels are intact.

PNG: W3C PNG (third edition), 5.3 and 11; JPEG: ITU T.81, B.1; EXIF: CIPA DC-008, 4.6 (TIFF 6.0, 2).
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from dataclasses import dataclass

from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
# Besides the critical chunks: transparency, and the mark of an animation.
_PNG_KEPT = (b"tRNS", b"acTL")

_OLD_EXIF = (
    b"Raw profile type exif\0\0"  # EXIF in PNGs of older tools: compressed hexadecimal digits
)
_XMP_PNG = b"XML:com.adobe.xmp\0"
_XMP_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
_EXIF = b"Exif\0\0"
_LARGEST_EXIF = 1024**2

_ORIENTATION = 0x0112
_SHORT = 3

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass
class ImageParts:
    """An image file without its metadata, and the two records that may hold its orientation.

    Args:
        data: the file, with only what the pixels need.
        exif: EXIF, from its TIFF header on; empty where absent.
        xmp: XMP, an XML text; empty where absent.
    """

    data: bytes
    exif: bytes = b""
    xmp: bytes = b""


def split_metadata(data: bytes) -> ImageParts:
    """Take the metadata out of a PNG or JPEG file; other files stay as they are."""
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    return ImageParts(data)


def _png(data: bytes) -> ImageParts:
    found, pieces, place = ImageParts(b""), [_PNG], len(_PNG)
    while place + 12 <= len(data):
        kind = data[place + 4 : place + 8]
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if not kind[0] & 32 or kind in _PNG_KEPT:  # bit 5: an ancillary chunk
            pieces.append(data[place:end])
        else:
            body = data[place + 8 : end - 4]
            if kind == b"eXIf":
                found.exif = body
            elif kind == b"iTXt" and body.startswith(_XMP_PNG):
                found.xmp = body
            elif kind == b"zTXt" and body.startswith(_OLD_EXIF) and not found.exif:
                found.exif = _from_hexadecimal(body[len(_OLD_EXIF) :])
        place = end
    found.data = b"".join([*pieces, data[place:]])
    return found


def _from_hexadecimal(packed: bytes) -> bytes:
    """Decode EXIF written as text: a line of its kind, one of its length, then digits."""
    with contextlib.suppress(zlib.error, ValueError):
        text = zlib.decompressobj().decompress(packed, _LARGEST_EXIF).decode("latin-1")
        return bytes.fromhex("".join(text.split("\n")[3:]))
    return b""


def _jpeg(data: bytes) -> ImageParts:
    found, pieces, place = ImageParts(b""), [data[:2]], 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker == 0xDA:  # start of scan: the pixels
            break
        end = place + 2 + length
        body = data[place + 4 : end]
        if marker == 0xE1 and body.startswith(_EXIF) and not found.exif:
            found.exif = body
        elif marker == 0xE1 and body.startswith(_XMP_JPEG):
            found.xmp = body
        # APP0 (JFIF) and APP14 (Adobe) say what the colours are; other APPs and COM do not.
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            pieces.append(data[place:end])
        place = end
    found.data = b"".join([*pieces, data[place:]])
    return found


def upright(image: Image.Image, parts: ImageParts) -> Image.Image:
    """Apply the orientation that the file states to a decoded image."""
    if image.format == "WEBP":
        parts = ImageParts(b"", image.info.get("exif") or b"", image.info.get("xmp") or b"")
    turn = _TURNS.get(_exif_orientation(parts.exif) or _xmp_orientation(parts.xmp))
    return image if turn is None else image.transpose(turn)


def _exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in the first directory; 0 where absent or unreadable."""
    while exif.startswith(_EXIF):  # some cameras write it twice
        exif = exif[len(_EXIF) :]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 0
    with contextlib.suppress(struct.error):  # cut off
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(count):
            at = start + 2 + 12 * entry
            tag, kind, length, value = struct.unpack_from(f"{order}HHIH", exif, at)
            if (tag, kind, length) == (_ORIENTATION, _SHORT, 1):
                return int(value) if 1 <= value <= 8 else 0
    return 0


def _xmp_orientation(xmp: bytes) -> int:
    said = re.search(rb'tiff:Orientation(?:="|>)([1-8])["<]', xmp)
    return int(said[1]) if said else 0
