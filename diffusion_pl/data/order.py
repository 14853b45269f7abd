"""The order of images as a pure function of (seed, index of the image in the run)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.seeds import seed_of


def _permutation(count: int, seed: int, *stream: object) -> Tensor:
    source = torch.Generator().manual_seed(seed_of(seed, *stream))
    return torch.randperm(count, generator=source)


@dataclass(frozen=True)
class Order:
    """An endless shuffled order of a data set: every image once per epoch.

    With a window, each epoch shuffles the shards, then shuffles the images within each group of
    `window` consecutive shards: only so many shards are read at a time.

    Args:
        count: images in the data set, at least 1.
        seed: of the shuffles; each epoch has its own.
        shards: images in each shard, in the order of the images; () where there are none.
        window: shards shuffled together; 0, or as many as there are: all images.

    Raises:
        UserError: a negative window.
    """

    count: int
    seed: int
    # Not hashed: every cached look-up hashes the order.
    shards: tuple[int, ...] = field(default=(), hash=False)
    window: int = 0

    def __post_init__(self) -> None:
        if self.window < 0:
            raise UserError(f"data.dataset.window must not be negative (got {self.window})")
        assert not self.shards or sum(self.shards) == self.count, "shards of another data set"

    def __call__(self, first: int, last: int) -> Tensor:
        """The images at positions first .. last - 1 of the run, counted in images from 0.

        Returns:
            int64 (last - first,), each in [0, count).
        """
        pieces = []
        while first < last:
            epoch, start = divmod(first, self.count)
            begin, images = self._around(epoch, start)
            piece = images[start - begin : start - begin + last - first]
            pieces.append(piece)
            first += len(piece)
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

    def _around(self, epoch: int, position: int) -> tuple[int, Tensor]:
        """The window at a position of an epoch: where it begins, and its images in order."""
        if self.window == 0 or self.window >= len(self.shards):
            return 0, _epoch(self.count, self.seed, epoch)
        _, begins = _windows(self, epoch)
        number = int(np.searchsorted(begins, position, side="right")) - 1
        return int(begins[number]), _window(self, epoch, number)


# Positions only advance, and several devices or resolutions in one process are at the same one.
@lru_cache(maxsize=2)
def _epoch(count: int, seed: int, epoch: int) -> Tensor:
    return _permutation(count, seed, "order", epoch)


@lru_cache(maxsize=2)
def _windows(order: Order, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The order of the shards in an epoch; the position at which each window begins."""
    shards = _permutation(len(order.shards), order.seed, "shards", epoch).numpy()
    ends = np.cumsum(np.array(order.shards)[shards])
    stops = np.append(ends[order.window - 1 : -1 : order.window], ends[-1])
    # Empty windows, of shards without images, are never the last that begins at a position.
    return shards, np.concatenate([[0], stops])


@lru_cache(maxsize=2)
def _window(order: Order, epoch: int, number: int) -> Tensor:
    shards = _windows(order, epoch)[0][number * order.window : (number + 1) * order.window]
    last = np.cumsum(order.shards)[shards]
    pieces = [np.arange(last[i] - order.shards[shard], last[i]) for i, shard in enumerate(shards)]
    images = torch.from_numpy(np.concatenate(pieces))
    return images[_permutation(len(images), order.seed, "window", epoch, number)]
