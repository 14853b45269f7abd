"""Held-out loss: the error on images that are not trained on, always with the same noise.

Image i's noise comes from (seed, i) alone, so the loss of one run may be compared from time to time
and from run to run, and falls smoothly while the training loss jumps with its noise levels.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_pl import ranks
from diffusion_pl.data.dataset import DatasetSpec
from diffusion_pl.data.loader import Degradation
from diffusion_pl.diffusion.conditions import received, sizes
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.levels import image_errors, level_errors, linear_error, spaced_levels
from diffusion_pl.evaluation.prompts import TextEncoder
from diffusion_pl.evaluation.provenance import now, surroundings
from diffusion_pl.evaluation.settings import Losses
from diffusion_pl.evaluation.sources import own_condition
from diffusion_pl.images import ImageDataset, from_bytes
from diffusion_pl.metrics.features import TILE


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Images to measure the loss on, with their conditions.

    Args:
        name: of their set.
        which: of its images, in words.
        held_out: whether none of them is trained on, as far as is known.
        fingerprint: of their set.
        images: uint8 (N, C, R, R).
        condition: of each, a row each; on the CPU.
    """

    name: str
    which: str
    held_out: bool
    fingerprint: str
    images: Tensor
    condition: Mapping[str, Tensor]

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the pixels, in [-1, 1]."""
        return from_bytes(self.images).std().item()


def open_held_out(
    settings: Losses,
    training: ImageDataset,
    dataset: DatasetSpec | None,
    network: Any,
    degradation: Degradation | None = None,
) -> HeldOut:
    """The images that the loss is measured on.

    Args:
        settings: how many.
        training: the training data, at full resolution.
        dataset: other images, such as a test set; None: the last images of the training data.
        network: takes the conditions.
        degradation: of the training, where the network takes images.

    Raises:
        UserError: images of another size, too few, or without what the network takes.
    """
    if dataset is None:
        images = training
    else:
        dataset.prepare()
        side = training.resolution
        images = dataset.open(None if side == dataset.resolution else side)
    if images.shape[1:] != training.shape[1:]:
        raise UserError(
            f"evaluation.losses: the images of {images.name} are {tuple(images.shape[1:])}, those "
            f"of the training {tuple(training.shape[1:])}"
        )
    total, count = len(images), min(settings.count, len(images))
    if count < 2:
        raise UserError(f"evaluation.losses: {images.name} has fewer than 2 images")
    if dataset is None:
        indices, which = torch.arange(total - count, total), f"the last {count:,} of {total:,}"
    else:
        indices = torch.arange(count) * total // count
        which = f"{count:,} of {total:,}, evenly spaced"
    encoder = None if training.texts is None else TextEncoder.of(training.texts)
    trained = dataset is None or images.fingerprint == training.fingerprint
    own = own_condition(images, indices, sizes(network), degradation, encoder)
    condition = received(network, own)
    return HeldOut(
        images.name + "-held-out" * (images.name == training.name and not trained),
        which,
        not trained,
        images.fingerprint,
        images.read(indices),
        condition,
    )


def measure(
    held: HeldOut,
    settings: Losses,
    denoiser: Denoiser,
    sigma_range: tuple[float, float],
    *,
    precision: torch.dtype | None = None,
    batch_size: int = TILE,
) -> dict[str, Any]:
    """The row of one kind of weights, without what they are; every rank calls it.

    Ranks share whole batches and call the denoiser equally often, so the numbers do not depend on
    how many there are, and weights may be sharded over them.

    Args:
        held: the images.
        settings: levels and seed of the noise.
        denoiser: D, in evaluation mode.
        sigma_range: lowest and highest level that the network knows.
        precision: autocast dtype, None for float32.
        batch_size: images at a time.

    Returns:
        `{"name": "loss@64/cifar10-test", "value": mean loss over the levels, "levels": [...], ...}`
        with all it depends on.
    """
    started = time.monotonic()
    sigmas = spaced_levels(sigma_range, settings.levels)
    device = next(denoiser.parameters()).device
    count, size = len(held.images), min(batch_size, TILE)
    share, most = ranks.rank_range(count, size), ranks.rank_range(count, size, of=0)
    found = [torch.empty(len(sigmas), 0, dtype=torch.float64, device=device)]
    autocast = torch.autocast(device.type, precision, enabled=precision is not None)
    for place in range(-(-len(most) // size)):
        first = share.start + place * size
        mine = first < share.stop
        # A rank without a batch measures the first one, for ranks that gather sharded weights.
        rows = slice(first, min(first + size, share.stop)) if mine else slice(0, min(size, count))
        clean = from_bytes(held.images[rows]).to(device)
        condition = {key: value[rows].to(device) for key, value in held.condition.items()}
        with autocast:
            errors = image_errors(
                denoiser,
                clean,
                sigmas,
                range(rows.start, rows.stop),
                condition=condition,
                seed=settings.seed,
            )
        if mine:
            found.append(errors)
    errors = ranks.gather(torch.cat(found, dim=1).T.contiguous()).T.cpu()
    sigma_data = held.sigma_data
    levels = level_errors(errors, sigmas, sigma_data)
    linear = torch.tensor([linear_error(sigma, sigma_data) for sigma in sigmas])
    each = (errors / linear[:, None]).mean(dim=0)  # of an image, over the levels
    return {
        "name": f"loss@{count}/{held.name}",
        "value": sum(level.loss for level in levels) / len(levels),
        "standard_error": (each.std() / count**0.5).item(),
        "n": count,
        "seed": settings.seed,
        "data": held.name,
        "which": held.which,
        "held_out": held.held_out,
        "fingerprint": held.fingerprint,
        "sigma_data": sigma_data,
        "sigmas": f"{len(sigmas)} from {sigmas[0]:.4g} to {sigmas[-1]:.4g}",
        "levels": [dataclasses.asdict(level) for level in levels],
        "precision": {None: "fp32", torch.bfloat16: "bf16"}.get(precision, "fp16"),
        "ranks": ranks.world_size(),
        **surroundings(device),
        "seconds": round(time.monotonic() - started, 2),
        "time": now(),
    }
