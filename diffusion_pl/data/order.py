"""The order of images as a pure function of (seed, index of the image in the run)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/order/{epoch}".encode(), digest_size=8).digest()
    source = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(count, generator=source)


@dataclass(frozen=True)
class Order:
    """A shuffled endless walk through a data set: every image once an epoch, epochs end to end.

    Args:
        count: images in the data set, at least 1.
        seed: of the shuffles; each epoch has its own.
    """

    count: int
    seed: int

    def __call__(self, first: int, last: int) -> Tensor:
        """Which image of the data set stands at positions first .. last - 1 of the run.

        Args:
            first: position in the run, counted in images from 0.
            last: the position after the last wanted; may lie epochs further.

        Returns:
            int64 (last - first,), each in 0 .. count - 1.
        """
        pieces = []
        while first < last:
            epoch, start = divmod(first, self.count)
            stop = min(self.count, start + last - first)
            pieces.append(_permutation(self.seed, epoch, self.count)[start:stop])
            first += stop - start
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
