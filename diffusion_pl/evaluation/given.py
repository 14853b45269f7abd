"""Images that lie in files, to be measured like drawn ones: numbers of anybody's model."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_pl.metrics.real_images import RealImages
from diffusion_pl.names import plain

# An archive of images unpacks to a few times its size; to more than this only one made for it does.
LARGEST_FACTOR = 64
SMALL = 256 * 1024**2  # bytes, in which the factor is no matter


@dataclass(frozen=True)
class Given:
    """Images of a data set or file in the place of drawn ones.

    Args:
        real: the images.
        channels: of an image.
        source: where they lie, for the numbers.
        device: where to measure them.
    """

    real: RealImages
    channels: int
    source: str
    device: torch.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.channels, self.real.resolution, self.real.resolution

    def images(self, indices: Sequence[int]) -> tuple[Tensor, int]:
        """The images with these indices; no network is evaluated.

        Raises:
            ValueError: there are fewer.
        """
        if max(indices) >= len(self.real):
            raise ValueError(
                f"{self.source}: has {len(self.real):,} images, {max(indices) + 1:,} are asked for"
            )
        return self.real.read(torch.tensor(indices)).to(self.device), 0

    def about(self) -> Mapping[str, Any]:
        """What a number says of these images."""
        return {"source": self.source, "source_fingerprint": self.real.fingerprint}


@dataclass(frozen=True)
class Arrays:
    """The images of an .npz file, as ADM's samples and our own `sample` write them.

    Args:
        name: of the file.
        fingerprint: sha256 (hex) of the file.
        array: uint8 (N, R, R, C).
    """

    name: str
    fingerprint: str
    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    @property
    def resolution(self) -> int:
        """Side of an image in pixels."""
        side: int = self.array.shape[1]
        return side

    def read(self, indices: Tensor) -> Tensor:
        """uint8 (n, C, R, R)."""
        return torch.from_numpy(self.array[indices.numpy()]).permute(0, 3, 1, 2).contiguous()


def arrays(path: Path) -> Arrays:
    """Open an .npz file of images: `images`, or `arr_0`, uint8 (N, R, R, C).

    Raises:
        ValueError: absent, damaged, or no such images in it.
    """
    try:
        content = path.read_bytes()
        _check_size(path, len(content))
        with np.load(path, allow_pickle=False) as file:
            keys = [key for key in ("images", "arr_0") if key in file.files]
            if not keys:
                raise ValueError(f"no array 'images' or 'arr_0' in it, only {file.files}")
            array = np.asarray(file[keys[0]])
    except Exception as error:
        # zipfile and numpy pass on whatever a damaged entry or header makes them raise.
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not an archive of images ({reason})") from error
    fits = array.ndim == 4 and array.shape[1] == array.shape[2] and array.shape[3] in (1, 3)
    if array.dtype != np.uint8 or not fits:
        raise ValueError(
            f"{path}: images must be uint8 (N, R, R, 3) (got {array.dtype} {array.shape})"
        )
    return Arrays(plain(path.stem), hashlib.sha256(content).hexdigest(), array)


def _check_size(path: Path, size: int) -> None:
    """Refuse what unpacks to far more than images do.

    Raises:
        ValueError: as said.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > max(LARGEST_FACTOR * size, SMALL):
        raise ValueError(f"unpacks to {unpacked:,} bytes, {unpacked // size:,} times its size")
