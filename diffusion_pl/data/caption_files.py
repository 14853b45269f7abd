"""The captions of a prepared data set, as they lie in its folder.

DEST/text/captions.txt    each different caption once, a line of UTF-8 each, in the order in
                          which the images first have them
DEST/text/lines.npy       int64 (U + 1,), the byte at which each line begins
DEST/text/starts.npy      int64 (N + 1,), where each image's part of numbers.npy begins
DEST/text/numbers.npy     uint32 (M,), lines of captions.txt from 0 on
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion_pl.data.stored import TEXT, CaptionFiles, StoredFile
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import regular, sha256_of, write_atomically
from diffusion_pl.texts import Captions


def write_captions(
    folder: Path, captions: Sequence[Sequence[str]], origin: str
) -> CaptionFiles | None:
    """Write the captions of all images, each file whole or not at all.

    Args:
        folder: of the data set.
        captions: of each image, in order.
        origin: what they were read from, in words.

    Returns:
        What was written; None, and nothing is, where no image has a caption.
    """
    table = Captions.of(captions)
    if not len(table):
        return None
    files = []
    for name, data in table.files().items():
        write_file(folder / TEXT / name, data)
        digest = hashlib.sha256(data).hexdigest()
        files.append(StoredFile(f"{TEXT}/{name}", len(data), digest))
    bare = sum(not each for each in captions)
    return CaptionFiles(len(table), len(table.numbers), bare, origin, files)


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    write_atomically(path, lambda file: file.write(data))


def open_captions(folder: Path, stored: CaptionFiles, images: int) -> Captions:
    """The captions, mapped from the disk and checked against the digests.

    Args:
        folder: of the data set, or where its files were fetched to.
        stored: of `dataset.json`.
        images: of the set.

    Raises:
        UserError: a file that is absent, damaged or not one of captions.
    """
    for each in stored.files:
        check_file(folder, each)
    paths = [folder / each.file for each in stored.files]
    words = np.memmap(regular(paths[0]), dtype=np.uint8, mode="r")
    lines, starts, numbers = (
        array_of(path, dtype) for path, dtype in zip(paths[1:], ("<i8", "<i8", "<u4"), strict=True)
    )
    problem = (
        (lines.shape != (stored.unique + 1,) and "another number of captions")
        or (starts.shape != (images + 1,) and "another number of images")
        or (numbers.shape != (stored.total,) and "another number of captions of images")
        or ((int(lines[0]), int(lines[-1])) != (0, len(words)) and "lines that end elsewhere")
        or ((int(starts[0]), int(starts[-1])) != (0, len(numbers)) and "images that end elsewhere")
        or (bool((np.diff(lines) < 1).any() | (np.diff(starts) < 0).any()) and "no order")
        or (bool((numbers >= stored.unique).any()) and "captions that are not there")
    )
    if problem:
        raise UserError(f"{folder / TEXT}: {problem}; prepare the data again")
    return Captions(words, lines, starts, numbers)


def check_file(folder: Path, stored: StoredFile) -> None:
    """Compare a file with its digest.

    Raises:
        UserError: absent, unreadable, or another.
    """
    path = folder / stored.file
    try:
        found = sha256_of(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); fetch or prepare the data again"
        ) from error
    if found != stored.sha256:
        raise UserError(f"{path}: changed since it was written; fetch or prepare the data again")


def array_of(path: Path, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Map an array file of one dimension from the disk.

    Raises:
        UserError: no such array.
    """
    try:
        array: npt.NDArray[Any] = np.lib.format.open_memmap(regular(path), mode="r")
    except Exception as error:
        # A damaged header is parsed as Python and raises nearly anything.
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}); prepare the data again") from error
    if array.dtype != np.dtype(dtype) or array.ndim != 1:
        raise UserError(f"{path}: holds another kind of array; prepare the data again")
    return np.asarray(array)  # whose items cost less than a memmap's
