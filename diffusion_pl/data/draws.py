"""Random numbers counted from (seed, stream, position): nothing is stored, nothing is skipped."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffusion_pl.seeds import seed_of

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seed: int, stream: str, positions: Tensor) -> Tensor:
    """One number a position, independent of which others are asked for.

    SplitMix64 (Steele, Lea & Flood 2014) at the counter `positions`.

    Args:
        seed: of the run.
        stream: what the numbers are for.
        positions: int64 (n,), counted from 0.

    Returns:
        float64 (n,), uniform in [0, 1).
    """
    # uint64 arithmetic wraps round, as the generator means it to.
    bits = np.uint64(seed_of(seed, stream)) + (positions.numpy().astype(np.uint64) + 1) * _GOLDEN
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = bits ^ (bits >> np.uint64(31))
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)
