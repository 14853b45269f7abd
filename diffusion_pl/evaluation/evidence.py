"""What a data set says about the settings that suit it, before and after a first short training.

standard deviation    of all values in [-1, 1] about their mean: EDM's sigma_data
slope                 a of the power spectrum ~ f^-a over the spatial frequency f, fitted to the
                      means over rings of equal f in log-log; 2 for photographs (Field 1987)
fine                  share of the power above half of the Nyquist frequency
copies                share of images whose bytes are those of another
near copies           share of images that are far nearer to one image than to any other, though
                      not equal to it (see metrics/memorised.py)
mirrored              distance of mirrored images to their nearest image over that of the images
                      themselves, medians: about 1 where mirror images belong to the data
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.images import ImageDataset, from_bytes
from diffusion_pl.metrics.memorised import MEMORISED, nearest

SEEN = 4096  # images that are looked at, evenly spaced
SEARCHED = 512  # of them, for whose neighbours is searched
FLAT = 2e-3  # gain at a level below which nothing is counted as learned


@dataclass(frozen=True)
class Evidence:
    """What is seen in the images alone; None where there are too few, or of one colour.

    Args:
        seen: number of images that were looked at.
        class_counts: images of each class among those.
        mean, std: of all values in [-1, 1].
        slope, fine: of the spectrum.
        copies, near: shares in [0, 1].
        mirrored: ratio of medians.
    """

    seen: int
    class_counts: tuple[int, ...]
    mean: float
    std: float
    slope: float | None
    fine: float | None
    copies: float
    near: float | None
    mirrored: float | None


def evidence_of(images: ImageDataset) -> Evidence:
    """Look at a data set.

    Raises:
        UserError: all its images are of one colour.
    """
    count = len(images)
    indices = torch.arange(min(count, SEEN)) * count // min(count, SEEN)
    seen = images.read(indices)
    clean = from_bytes(seen)
    if not (std := clean.double().std().item()) > 0:
        raise UserError(f"{images.name}: every pixel has one value; nothing can be learned")
    labels = () if images.labels is None else images.labels[indices].tolist()
    counted = Counter(labels)
    slope, fine = spectrum(clean)
    near, mirrored = _neighbours(seen)
    return Evidence(
        seen=len(seen),
        class_counts=tuple(counted[label] for label in range(images.classes)),
        mean=clean.double().mean().item(),
        std=std,
        slope=slope,
        fine=fine,
        copies=_copies(seen),
        near=near,
        mirrored=mirrored,
    )


def spectrum(clean: Tensor) -> tuple[float | None, float | None]:
    """Slope of the power spectrum, and the share of the power above half of Nyquist.

    Args:
        clean: float (N, C, R, R).

    Returns:
        (None, None) of images below 8 pixels or without any contrast.
    """
    side = clean.shape[-1]
    if side < 8:
        return None, None
    total = torch.zeros(side, side, dtype=torch.float64)
    for piece in clean.split(256):
        waves = torch.fft.fft2(piece - piece.mean(dim=(-2, -1), keepdim=True))
        total += waves.abs().double().square().sum(dim=(0, 1))
    along = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    radius = (along[:, None].square() + along.square()).sqrt()
    if not (power := total.sum().item()) > 0:
        return None, None
    fine = total[radius > side / 4].sum().item() / power
    rings = [radius.round() == ring for ring in range(1, side // 2)]
    x = torch.stack([radius[ring].log().mean() for ring in rings])
    y = torch.stack([total[ring].log().mean() for ring in rings])
    there = y.isfinite()  # of every frequency some power
    if there.sum() < 2:
        return None, fine
    centred = x[there] - x[there].mean()
    slope = -(centred * y[there]).sum() / centred.square().sum()
    return slope.item(), fine


def _copies(seen: Tensor) -> float:
    """The share of images whose bytes are those of another."""
    known = Counter(hashlib.sha256(each.numpy().tobytes()).digest() for each in seen)
    return sum(number for number in known.values() if number > 1) / len(seen)


def _neighbours(seen: Tensor) -> tuple[float | None, float | None]:
    """The share of near copies, and how much farther mirrored images are from the others."""
    count = len(seen)
    if count < 16:
        return None, None
    every = torch.arange(count)
    own = torch.arange(min(count, SEARCHED)) * count // min(count, SEARCHED)
    store = _Seen(seen)
    plain = nearest(seen[own], store, every, own=own)
    flipped = nearest(seen[own].flip(-1), store, every, own=own)
    first = plain.distances[:, 0]
    near = ((plain.ratios < MEMORISED) & (first > 0)).double().mean().item()
    middle = first.median().item()
    return near, flipped.distances[:, 0].median().item() / middle if middle > 0 else None


@dataclass(frozen=True, eq=False)
class _Seen:
    """Images in memory as a store."""

    images: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]


@dataclass(frozen=True)
class Learned:
    """Where a short training has lowered the loss: the noise levels at which images are decided.

    The loss is that of F, which EDM's weight makes 1 at every level for a network that has learned
    nothing beyond the variance of a pixel. Where it falls below 1 between two budgets there is
    something to learn at this stage; where it does not, images drawn at that level are spent for
    nothing (Karras et al. 2022, section 5, choose their distribution by this argument). What it
    loses above 1 it had itself added.

    Args:
        levels: of (sigma, loss after the first budget, loss after the whole, fall below 1).
        P_mean, P_std: mean and standard deviation of ln sigma, weighted by the fall.
    """

    levels: tuple[tuple[float, float, float, float], ...]
    P_mean: float
    P_std: float


def learned(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Learned:
    """The noise levels at which the loss fell.

    Args:
        before, after: rows of one set of levels with `sigma` and `loss`.

    Raises:
        UserError: it fell nowhere.
    """
    levels = tuple(
        (one["sigma"], one["loss"], two["loss"], min(one["loss"], 1.0) - min(two["loss"], 1.0))
        for one, two in zip(before, after, strict=True)
    )
    weights = [fall if fall > FLAT else 0.0 for *_, fall in levels]
    if not sum(weights) > 0:
        raise UserError(
            "the loss of the short training fell at no noise level: train longer by --probe"
        )
    places = [math.log(sigma) for sigma, *_ in levels]
    total = math.fsum(weights)
    mean = math.fsum(w * at for w, at in zip(weights, places, strict=True)) / total
    variance = math.fsum(w * (at - mean) ** 2 for w, at in zip(weights, places, strict=True))
    return Learned(levels, mean, math.sqrt(variance / total))
