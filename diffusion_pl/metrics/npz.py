"""Untrusted .npz archives: headers are checked first, then single arrays are read by name.

Archives and arrays that unpack to far more than their size are refused; nothing is unpickled.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.images import Images
from diffusion_pl.io.files import regular, sha256_of
from diffusion_pl.names import plain

# Images compress by a small factor; a larger one means a zip bomb.
LARGEST_FACTOR = 64
SMALL = 256 * 1024**2  # bytes, below which the factor is not checked

IMAGES = ("images", "arr_0")  # written by `sample`, and by ADM

_LOCAL = struct.Struct("<26xHH")  # of a local header: the lengths of name and extra field


@dataclass(frozen=True)
class Entry:
    """Header of an array in an archive.

    Args:
        shape: of the array.
        dtype: of its elements.
        start: bytes of the header before the elements.
        info: of the zip entry.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    info: zipfile.ZipInfo

    @property
    def bytes(self) -> int:
        """Size of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def entries(path: Path) -> Mapping[str, Entry]:
    """Headers of the arrays in an archive, by name; no array is read.

    Raises:
        UserError: it unpacks to far more than its size.
        Exception: anything that zipfile and numpy raise for damaged files.
    """
    found = {}
    with zipfile.ZipFile(regular(path)) as archive:
        size, unpacked = path.stat().st_size, sum(each.file_size for each in archive.infolist())
        if unpacked > max(LARGEST_FACTOR * size, SMALL):
            raise UserError(f"unpacks to {unpacked:,} bytes, {unpacked // size:,} times its size")
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            name = info.filename.removesuffix(".npy")
            with archive.open(info) as file:
                if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                    # As numpy: bytes.
                    found[name] = Entry((), np.dtype(f"S{max(1, info.file_size)}"), 0, info)
                    continue
                file.seek(0)
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, by_columns, dtype = read(file)
                start = file.tell()
            if by_columns and len(shape) > 1:
                raise UserError(f"{name} is stored by columns; save it anew")
            found[name] = Entry(shape, dtype, start, info)
    if not found:
        raise UserError("no arrays in it")
    return found


def numbers(path: Path, entry: Entry) -> np.ndarray:
    """Read one array.

    Raises:
        UserError: an array of objects, or one whose size is not that of its header.
        Exception: anything that zipfile and numpy raise for damaged files.
    """
    if entry.dtype.hasobject:
        raise UserError("an array of objects, which are not unpickled")
    _check_size(entry)
    with zipfile.ZipFile(path) as archive, archive.open(entry.info) as file:
        file.read(entry.start)
        content = file.read(entry.bytes + 1)
    return np.frombuffer(content, entry.dtype).reshape(entry.shape)


@dataclass(frozen=True)
class _ChannelsLast:
    """Images in an array (N, R, R, C), which may be memory-mapped."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        count, height, width, channels = self.array.shape
        return count, channels, height, width

    def read(self, indices: Tensor) -> Tensor:
        images = np.ascontiguousarray(self.array[indices.numpy()])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def arrays(path: Path) -> Images:
    """Open an .npz file of images: `images` or `arr_0`, uint8 (N, R, R, C).

    The fingerprint is the sha256 (hex) of the file. A large uncompressed array is memory-mapped.

    Raises:
        UserError: absent, damaged, or without such images.
    """
    try:
        found = entries(path)
        names = [name for name in IMAGES if name in found]
        if not names:
            raise UserError(f"no array 'images' or 'arr_0' in it, only {list(found)}")
        entry = found[names[0]]
        if entry.dtype.hasobject:
            raise UserError(f"{names[0]} holds objects, which are not unpickled")
        _check_size(entry)
        problem = unfit(entry)
        content = None if problem else _images(path, entry)
        digest = sha256_of(path)
    except Exception as error:
        # zipfile and numpy pass on whatever a damaged entry or header makes them raise.
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not an archive of images ({reason})") from error
    if content is None:
        raise UserError(f"{path}: images {problem}")
    return Images(plain(path.stem), _ChannelsLast(content), digest)


def _check_size(entry: Entry) -> None:
    """Refuse an array whose size is not that of its header."""
    if entry.info.file_size != entry.start + entry.bytes:
        raise UserError(f"an array {entry.shape} in {entry.info.file_size:,} bytes")


def unfit(entry: Entry) -> str | None:
    """Why an array does not hold images, and what to do; None if it does."""
    shape, dtype = entry.shape, entry.dtype
    got = f"must be uint8 (N, R, R, 3) (got {dtype} {shape})"
    if len(shape) == 3 and shape[1] == shape[2] and dtype == np.uint8:
        return f"{got}; add the channel: x[..., None]"
    if len(shape) != 4:
        return got
    if shape[1] in (1, 3) and shape[2] == shape[3] and shape[3] != shape[1]:
        return f"{got}; channels stand last: x.transpose(0, 2, 3, 1)"
    if dtype != np.uint8:
        return f"{got}; save bytes, 0 to 255, as your sampler quantises them"
    if shape[1] != shape[2]:
        return f"{got}; images must be square"
    if shape[3] == 4:
        return f"{got}; put them on a ground, and leave the fourth channel out"
    return None if shape[3] in (1, 3) and min(shape) > 0 else got


def _images(path: Path, entry: Entry) -> np.ndarray:
    """The array, memory-mapped if large and uncompressed; refused if it cannot be read."""
    info = entry.info
    if info.compress_type != zipfile.ZIP_STORED or entry.bytes <= SMALL:
        return numbers(path, entry)
    with regular(path).open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or info.flag_bits & 1:
        raise UserError(f"{info.filename} cannot be read")
    start = info.header_offset + 30 + sum(_LOCAL.unpack(header)) + entry.start
    if start + entry.bytes > path.stat().st_size:
        raise UserError(f"{info.filename} is cut")
    return np.memmap(path, entry.dtype, "r", start, entry.shape)
