"""The denoiser's error at each noise level, without sampling an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_pl.diffusion.conditions import Condition
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.evaluation.generator import batches


@dataclass(frozen=True)
class LevelError:
    """The error at one level.

    Args:
        sigma: the noise level.
        error: mean of (D(x + sigma n; sigma) - x)^2 over images and pixels; x in [-1, 1].
        standard_error: of that mean, over images.
        loss: error / (sigma^2 sigma_data^2 / (sigma^2 + sigma_data^2)), weighted as in Karras et
            al. 2022: 1 for the best linear denoiser of white pixels of that variance.
    """

    sigma: float
    error: float
    standard_error: float
    loss: float


@torch.inference_mode()
def errors_by_level(
    denoise: Denoise,
    images: Tensor,
    sigmas: Sequence[float],
    *,
    condition: Condition | None = None,
    sigma_data: float = 0.5,
    seed: int = 0,
    batch_size: int = 64,
) -> list[LevelError]:
    """Measure a denoiser at given noise levels, with the same noise at all of them.

    Args:
        denoise: D.
        images: clean, float32 (N, C, H, W) in [-1, 1], on the denoiser's device.
        sigmas: the levels.
        condition: of the images, a row each; None for an unconditional model.
        sigma_data: standard deviation of the pixels, for `loss`.
        seed: of the noise of each image.
        batch_size: images per batch; changes no number.
    """
    found = []
    for sigma in sigmas:
        each = []
        for piece in batches(range(len(images)), batch_size):
            rows = slice(piece[0], piece[-1] + 1)
            clean = images[rows]
            noise = ImageNoise(seed, piece, "levels")(torch.empty(clean.shape)).to(clean.device)
            level = torch.tensor(sigma, dtype=torch.float32, device=clean.device)
            more = {key: value[rows] for key, value in (condition or {}).items()}
            difference = denoise(clean + level * noise, level, **more)[:, : clean.shape[1]] - clean
            each.append(difference.double().square().flatten(1).mean(dim=1))
        values = torch.cat(each)
        error = values.mean().item()
        variance = sigma**2 * sigma_data**2 / (sigma**2 + sigma_data**2)
        standard_error = (values.std() / len(values) ** 0.5).item()
        found.append(LevelError(sigma, error, standard_error, error / variance))
    return found
