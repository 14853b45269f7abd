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

LOWEST, HIGHEST = 0.002, 80.0  # levels that are measured where the objective has no limits


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


def spaced_levels(sigma_range: tuple[float, float], count: int) -> list[float]:
    """Levels evenly spaced in log sigma.

    Args:
        sigma_range: lowest and highest level that the network knows.
        count: of the levels, at least 2.
    """
    low, high = max(sigma_range[0], LOWEST), min(sigma_range[1], HIGHEST)
    ends = torch.tensor([low, high], dtype=torch.float64).log()
    levels: list[float] = torch.linspace(ends[0].item(), ends[1].item(), count).exp().tolist()
    return levels


def linear_error(sigma: float, sigma_data: float) -> float:
    """The error of the best linear denoiser of white pixels, sigma^2 sd^2 / (sigma^2 + sd^2)."""
    return sigma**2 * sigma_data**2 / (sigma**2 + sigma_data**2)


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
    found = [
        image_errors(
            denoise,
            images[piece[0] : piece[-1] + 1],
            sigmas,
            piece,
            condition={
                key: value[piece[0] : piece[-1] + 1] for key, value in (condition or {}).items()
            },
            seed=seed,
        )
        for piece in batches(range(len(images)), batch_size)
    ]
    return level_errors(torch.cat(found, dim=1), sigmas, sigma_data)


@torch.no_grad()  # not inference_mode: the weights may be in training
def image_errors(
    denoise: Denoise,
    images: Tensor,
    sigmas: Sequence[float],
    indices: Sequence[int],
    *,
    condition: Condition,
    seed: int = 0,
) -> Tensor:
    """The mean squared error of each image at each level, float64 (levels, n).

    Args:
        denoise: D.
        images: clean, float32 (n, C, H, W) in [-1, 1], on the denoiser's device.
        sigmas: the levels.
        indices: of the images, from which their noise is drawn: the same at all levels.
        condition: of the images, a row each.
        seed: of the noise.
    """
    noise = ImageNoise(seed, indices, "levels")(torch.empty(images.shape)).to(images.device)
    found = []
    for sigma in sigmas:
        level = torch.tensor(sigma, dtype=torch.float32, device=images.device)
        denoised = denoise(images + level * noise, level, **condition)[:, : images.shape[1]]
        found.append((denoised - images).double().square().flatten(1).mean(dim=1))
    return torch.stack(found)


def level_errors(errors: Tensor, sigmas: Sequence[float], sigma_data: float) -> list[LevelError]:
    """The errors of images, pooled at each level.

    Args:
        errors: float64 (levels, N), from `image_errors`.
        sigmas: the levels.
        sigma_data: standard deviation of the pixels.
    """
    return [
        LevelError(
            sigma,
            each.mean().item(),
            (each.std() / len(each) ** 0.5).item(),
            each.mean().item() / linear_error(sigma, sigma_data),
        )
        for sigma, each in zip(sigmas, errors, strict=True)
    ]
