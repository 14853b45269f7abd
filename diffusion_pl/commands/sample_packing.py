"""Sampled images as files: PNG, one .npz, or WebDataset tars; see `sample_folder`."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffusion_pl.errors import UserError
from diffusion_pl.images import png_bytes
from diffusion_pl.io.files import regular, write_atomically

Format = Literal["png", "npz", "tar"]

SHARD = 1000  # images of a tar: number k has the indices 1000 k .. 1000 k + 999
ARRAYS = "images.npz"


def shard_of(images: Path, index: int) -> Path:
    """The tar of an image.

    Args:
        images: the folder.
        index: of the image.
    """
    return images / f"{index // SHARD:06d}.tar"


def pixels_of(png: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of a PNG, uint8 (H, W, C)."""
    with Image.open(io.BytesIO(png)) as file:
        pixels = np.array(file)
    return pixels.reshape(*pixels.shape[:2], -1)


class Packed:
    """Images in the tars or the .npz of a folder, read as PNG.

    Args:
        folder: of the samples.
        images: its folder of images.
        held: indices of the images; empty for none.
        kind: of the files.
    """

    def __init__(self, folder: Path, images: Path, held: range, kind: Format) -> None:
        self.folder, self.images, self.held, self.kind = folder, images, held, kind
        self._shard: tuple[Path, dict[str, bytes]] = (Path(), {})
        self._array: npt.NDArray[np.uint8] | None = None

    def read(self, index: int) -> bytes:
        """The PNG of an image.

        Raises:
            UserError: it is not there, or its file is damaged.
        """
        try:
            if self.kind == "npz":
                return png_bytes(self._read_array()[index - self.held.start])
            return self._read_shard(shard_of(self.images, index))[f"{index:06d}.png"]
        except (OSError, KeyError, IndexError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{self.folder}: image {index} cannot be read ({error!r}); remove the folder and "
                "sample again, or sample into another: --out"
            ) from error

    def _read_array(self) -> npt.NDArray[np.uint8]:
        if self._array is None:
            with np.load(regular(self.folder / ARRAYS), allow_pickle=False) as arrays:
                self._array = arrays["images"]
        return self._array

    def _read_shard(self, path: Path) -> dict[str, bytes]:
        if self._shard[0] != path:
            with tarfile.open(regular(path), "r:") as tar:
                files = ((each.name, tar.extractfile(each)) for each in tar)
                self._shard = path, {name: file.read() for name, file in files if file}
        return self._shard[1]


def write_shards(
    images: Path,
    whole: range,
    held: range,
    read: Callable[[int], bytes],
    about: Callable[[Sequence[int]], list[dict[str, bytes]]],
) -> None:
    """Write the tars of images, each whole or not at all; one that has all of its images stays.

    A sample is 000000.png, with 000000.cls (a number) and 000000.txt (a prompt) where the images
    have them. The same images make the same bytes.

    Args:
        images: the folder.
        whole: indices of all images.
        held: indices of those that are in tars already.
        read: the PNG of an image.
        about: further members of some images, by ending.
    """
    import webdataset  # half a second, and needed for tars alone

    webdataset.utils.enforce_security = True  # see data.write_shards
    for number in range(whole.start // SHARD, (whole.stop - 1) // SHARD + 1):
        first, last = number * SHARD, (number + 1) * SHARD
        wanted = range(max(first, whole.start), min(last, whole.stop))
        path = shard_of(images, first)
        before = range(max(first, held.start), min(last, held.stop))
        if wanted == before and path.exists():
            continue
        members = about(wanted)

        def write(
            file: IO[bytes],
            wanted: range = wanted,
            members: list[dict[str, bytes]] = members,
        ) -> None:
            # No user, group or time: the same bytes everywhere.
            with webdataset.TarWriter(file, encoder=False, user="", group="", mtime=0) as tar:
                for index, more in zip(wanted, members, strict=True):
                    tar.write({"__key__": f"{index:06d}", "png": read(index), **more})

        write_atomically(path, write)


def write_arrays(
    path: Path, pixels: Iterator[npt.NDArray[np.uint8]], shape: tuple[int, ...], more: Any
) -> None:
    """Write an .npz of images, one after another, so that they need not fit into memory.

    Args:
        path: the file.
        pixels: of each image, uint8 (H, W, C).
        shape: (n, H, W, C) of the array `images`.
        more: further arrays by name.
    """

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("images.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for each in pixels:
                    member.write(np.ascontiguousarray(each).tobytes())
            for name, array in more.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    write_atomically(path, write)
