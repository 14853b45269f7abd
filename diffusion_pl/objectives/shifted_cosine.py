"""The noise levels of simple diffusion (arXiv:2301.11093): the cosine, shifted for large images.

Averaging s x s pixels divides the noise's std by s, so an image of d pixels a side at sigma d / ref
is as noisy, seen at ref pixels, as one of ref pixels is at sigma.

| schedule | formula, logSNR = -2 ln sigma | where |
|---|---|---|
| cosine | sigma = tan(t_a + u (t_b - t_a)), from logSNR 15 at u = 0 to -15 at 1 | section 2 |
| shifted | logSNR + 2 ln(ref / d), that is sigma d / ref | Eq. 5 |
| interpolated | u logSNR_low + (1 - u) logSNR_high | Eq. 6 |

Two doubts, each with its flag. Whether the ends shift too: here they stay at +-15 and the curve
between them shifts, `moved_ends` shifts all of it; they differ only near the ends. Which way Eq. 6
interpolates: two public implementations have the lower reference, so more noise, at the noisy end,
as here; reading notes on the paper have it the other way round, `low_at_image`. The paper's own
text was not at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_pl.errors import UserError


def above_zero(steps: int) -> Tensor:
    """The quantiles that the paper's sampler visits, i / N for i = N .. 1, float64 (N,).

    Its last step, from 1 / N, returns the denoised image; `schedules.uniform` visits 0 too.

    Raises:
        UserError: fewer than one step.
    """
    if steps < 1:
        raise UserError(f"a sampler needs at least 1 step (got {steps})")
    return torch.arange(steps, 0, -1, dtype=torch.float64) / steps


@dataclass(frozen=True)
class ShiftedCosine:
    """The cosine of `reference` pixels, shifted for images of `resolution`.

    Args:
        resolution: d, side of the images in pixels.
        reference: side at which the cosine is left as it is; 32 and 64 are the paper's best.
        limit: largest |logSNR|, of the unshifted curve with `moved_ends`.
        moved_ends: shift the ends too.
    """

    resolution: int
    reference: int
    limit: float = 15.0
    moved_ends: bool = False

    def __post_init__(self) -> None:
        if self.resolution < 1 or self.reference < 1:
            raise UserError(
                "resolution and reference must be positive "
                f"(got {self.resolution} and {self.reference})"
            )
        if self.limit <= 0:
            raise UserError(f"limit must be positive (got {self.limit})")

    @property
    def _ends(self) -> tuple[float, float]:
        """The angles t_a and t_b of the unshifted curve."""
        shift = 0.0 if self.moved_ends else 2 * math.log(self.reference / self.resolution)
        low = math.atan(math.exp((shift - self.limit) / 2))
        return low, math.atan(math.exp((shift + self.limit) / 2))

    def __call__(self, u: Tensor) -> Tensor:
        low, high = self._ends
        return torch.tan(low + u * (high - low)) * (self.resolution / self.reference)

    def speed(self, sigma: Tensor) -> Tensor:
        """-d logSNR / du at a level, > 0: 4 (t_b - t_a) / sin(2 phi), phi = t_a + u (t_b - t_a).

        Its reciprocal is the density of the logSNR in training.
        """
        low, high = self._ends
        tangent = sigma * (self.reference / self.resolution)
        return 2 * (high - low) * (tangent + 1 / tangent)  # 2 / sin(2 phi) = tan + 1 / tan


@dataclass(frozen=True)
class InterpolatedCosine:
    """From the shift of one reference at the image's end to that of another at the noisy end.

    Args:
        resolution: d, side of the images in pixels.
        low: the smaller reference; more noise.
        high: the larger reference, below 23 low: beyond it Eq. 6 as noted does not always increase.
        limit: largest |logSNR|, of the unshifted curve with `moved_ends`.
        moved_ends: shift the ends too.
        low_at_image: the other direction of interpolation.
    """

    resolution: int
    low: int = 32
    high: int = 256
    limit: float = 15.0
    moved_ends: bool = False
    low_at_image: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < 23 * self.low:
            raise UserError(
                f"low must lie below high, and high below 23 low (got {self.low} and {self.high})"
            )

    def __call__(self, u: Tensor) -> Tensor:
        image, noise = (self.low, self.high) if self.low_at_image else (self.high, self.low)
        at_image, at_noise = (
            ShiftedCosine(self.resolution, reference, self.limit, self.moved_ends)(u)
            for reference in (image, noise)
        )
        # A mean of the logSNRs is a geometric mean of the levels.
        return at_image ** (1 - u) * at_noise**u
