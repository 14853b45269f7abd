"""Simple diffusion: Hoogeboom, Heek & Salimans, simple diffusion: End-to-end diffusion for high
resolution images, 2023, arXiv:2301.11093.

| part | formula | where |
|---|---|---|
| noise levels | u uniform, the cosine shifted; see shifted_cosine.py | Eq. 5, 6 |
| c_skip, c_out | alpha^2 = 1 / (1 + sigma^2), -sigma alpha: D = alpha z - sigma_z v | section 2 |
| c_in | alpha: the network sees z = alpha x + sigma_z eps | section 2 |
| c_noise | 1000 atan(sigma) 2 / pi, sigma within e^-10 to e^10 | the authors' earlier code |
| weight | 1 / sigma^2, the squared error of eps, though the network predicts v | notes on it |
| pooling | mean over channels and pixels | notes on it |
| above 256 pixels | sum over s = 32, 64, ..., d of the mean at s x s pixels / s | section 3.2 |

The paper was read through notes. Those on its last row differ: 1 / s of an error that is summed
over the s^2 pixels and divided by their number, which is the row above; or 1 / s^2 in all. c_noise
is the angle of the state on the cosine, whatever the shift; the factor 1000 stands here, not in the
network, so that every network of the frame sees timesteps of the usual size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_pl.diffusion.objective import EpsWeight, Objective, Weight, pixel_mean
from diffusion_pl.diffusion.preconditioning import Coefficients
from diffusion_pl.diffusion.schedules import Schedule


@dataclass(frozen=True)
class PredictVelocity:
    """The preconditioning of a network that predicts v = alpha eps - sigma_z x from z.

    Args:
        schedule: of the training, whose ends are the levels that the network knows.
    """

    schedule: Schedule

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The levels of the schedule at u = 0 and u = 1."""
        low, high = self.schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        return low, high

    def __call__(self, sigma: Tensor) -> Coefficients:
        alpha = (1 + sigma.square()).rsqrt()
        angle = torch.atan(sigma.clamp(math.exp(-10), math.exp(10)))  # logSNR within +-20
        return Coefficients(
            c_skip=alpha.square(),
            c_out=-sigma * alpha,
            c_in=alpha,
            c_noise=1000 * angle / (math.pi / 2),
        )


@dataclass(frozen=True)
class Multiscale:
    """The loss of section 3.2: the mean square of the error averaged to every s x s, times 1 / s.

    Averaged noise is small, of variance (s / d)^2: the low scales count little for noise and in
    full for what is wrong with a whole region.

    Args:
        smallest: the lowest side in pixels; images that are smaller count at their own.
    """

    smallest: int = 32

    def __call__(self, error: Tensor) -> Tensor:
        """(B, C, H, W) -> (B,), H = W."""
        side = error.shape[-1]
        total = pixel_mean(error) / side
        while side % 2 == 0 and side // 2 >= self.smallest:
            side //= 2
            error = F.avg_pool2d(error, 2)
            total = total + pixel_mean(error) / side
        return total


def SimpleDiffusion(
    schedule: Schedule, multiscale: bool = False, weight: Weight | None = None
) -> Objective:
    """The eps loss of a network that predicts v.

    Args:
        schedule: u -> sigma; a `ShiftedCosine` or `InterpolatedCosine`.
        multiscale: pool the error over several scales; the paper does above 256 pixels.
        weight: lambda(sigma) on the image's error; the noise's squared error when None.
    """
    return Objective(
        schedule=schedule,
        preconditioning=PredictVelocity(schedule),
        weight=EpsWeight() if weight is None else weight,
        reduce=Multiscale() if multiscale else pixel_mean,
    )
