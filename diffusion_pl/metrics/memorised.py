"""Whether samples are copies of training images: distances to the two nearest, and their ratio.

    d(a, b)    root mean square of a - b over pixels and channels, in [0, 1]
    ratio      d(x, first) / d(x, second), the nearest and second nearest training image

A sample counts as memorised where the ratio is below 1/3 (Yoon et al. 2023, "Diffusion
Probabilistic Models Generalize when They Fail to Memorize"): a copy is far nearer to its
original than to any other image. Training images against the others, themselves left out, give the
share that such data have by themselves. Copies of an image that is in the data twice are not found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_pl.errors import UserError
from diffusion_pl.images import Store

MEMORISED = 1 / 3  # ratios below
SIDE = 32  # pixels to which larger images are reduced, by the mean over areas
PIECE = 1000  # training images at a time


@dataclass(frozen=True)
class Nearest:
    """The two nearest training images of each query.

    Args:
        indices: int64 (n, 2), the nearest first.
        distances: float64 (n, 2), in [0, 1].
    """

    indices: Tensor
    distances: Tensor

    @property
    def ratios(self) -> Tensor:
        """float64 (n,) in [0, 1]; 0 of an exact copy."""
        first, second = self.distances.unbind(dim=1)
        return torch.where(first > 0, first / second.clamp_min(first), first.new_zeros(()))

    @property
    def memorised(self) -> float:
        """The share of ratios below MEMORISED."""
        return float((self.ratios < MEMORISED).double().mean())


def nearest(
    queries: Tensor,
    images: Store,
    among: Tensor,
    *,
    mirrored: bool = False,
    own: Tensor | None = None,
) -> Nearest:
    """The two nearest images of each query.

    Args:
        queries: uint8 (n, C, R, R).
        images: the training images, of the queries' shape.
        among: int64 (m,), distinct indices of those that are searched.
        mirrored: an image also counts by its mirror image, where training flips.
        own: int64 (n,), the index of each query that is itself an image, which is left out.

    Raises:
        UserError: fewer than two images are left, or they have another shape.
    """
    if len(among) < 2 + (own is not None):
        raise UserError(f"nearest images: {len(among)} images are too few to search")
    if images.shape[1:] != queries.shape[1:]:
        raise UserError(
            f"nearest images: the data's are {tuple(images.shape[1:])}, the samples "
            f"{tuple(queries.shape[1:])}"
        )
    wanted = _vectors(queries)
    flipped = _vectors(queries.flip(-1))
    best = torch.full((len(queries), 2), torch.inf, dtype=torch.float64)
    places = torch.zeros(len(queries), 2, dtype=torch.int64)
    for rows in among.split(PIECE):
        seen = _vectors(images.read(rows))
        squared = _squared(wanted, seen)
        if mirrored:
            squared = torch.minimum(squared, _squared(flipped, seen))
        if own is not None:
            squared[own[:, None] == rows] = torch.inf
        every = torch.cat([best, squared], dim=1)
        best, chosen = every.topk(2, dim=1, largest=False)
        indices = torch.cat([places, rows.expand(len(queries), -1)], dim=1)
        places = indices.gather(1, chosen)
    scale = 255 * wanted.shape[1] ** 0.5
    return Nearest(places, best.sqrt() / scale)


def _vectors(images: Tensor) -> Tensor:
    """float64 (n, C h h), values 0 to 255, of at most SIDE pixels."""
    vectors = images.cpu().double()
    if vectors.shape[-1] > SIDE:
        vectors = functional.interpolate(vectors, size=(SIDE, SIDE), mode="area")
    return vectors.flatten(1)


def _squared(one: Tensor, other: Tensor) -> Tensor:
    """Squared distances (n, m); exact of whole numbers, as all sums are below 2^53."""
    lengths = one.square().sum(dim=1)[:, None] + other.square().sum(dim=1)
    return (lengths - 2 * one @ other.T).clamp_min(0)
