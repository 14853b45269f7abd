"""Guidance and clipping: functions that turn one denoiser into another, denoise -> denoise.

Keywords that are not theirs pass through to the denoiser below.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Denoise


def classifier_free(denoise: Denoise, *, label: Tensor, weight: float) -> Denoise:
    """Classifier-free guidance, D = D_none + weight (D_label - D_none) (Ho & Salimans 2022).

    Args:
        denoise: a conditional denoiser that was trained with label dropout.
        label: int64 (B,), the wanted classes; -1 means no label.
        weight: 1 is the plain conditional model, 0 the unconditional one; in the notation of the
            paper weight = 1 + w. Each call then costs one evaluation of the network on 2 B images.

    Returns:
        A denoiser `(x, sigma) -> x_hat` with the label closed in.
    """
    if weight == 1:
        return conditioned(denoise, label=label)

    def guided(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        labels = torch.cat([label, torch.full_like(label, -1)])
        levels = sigma.repeat(2) if sigma.ndim else sigma
        with_label, without = denoise(x.repeat(2, 1, 1, 1), levels, label=labels, **more).chunk(2)
        return without + weight * (with_label - without)

    return guided


def conditioned(denoise: Denoise, **condition: Any) -> Denoise:
    """Close a condition in, so that a sampler never sees it."""

    def with_condition(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        return denoise(x, sigma, **condition, **more)

    return with_condition


def clipped(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
    """Clip the denoised image to the range of images, as DDPM's sampler does (released code)."""

    def clip(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        image, variance = denoise(x, sigma, **more).tensor_split([x.shape[1]], dim=1)
        return torch.cat([image.clamp(low, high), variance], dim=1)

    return clip
