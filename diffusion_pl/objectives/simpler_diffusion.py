"""SiD2: Hoogeboom et al., Simpler Diffusion (SiD2): 1.5 FID on ImageNet512 with pixel-space
diffusion, 2024, arXiv:2410.19324. Everything else as simple_diffusion.py.

| part | formula | where |
|---|---|---|
| weight, of the eps error | sigmoid(b - logSNR) | two re-implementations that cite the paper |
| the same, of the image's error | e^b sigmoid(logSNR - b) = 1 / (sigma^2 + e^-b) | algebra |
| in the bound's form | times -d logSNR / du, half of it | Kingma 2021, arXiv:2107.00630, Eq. 18 |

So it is the soft min-SNR weight with gamma = e^b (diffusion/weights.py). Without the last row the
schedule weighs too: u is uniform, so levels count as often as the schedule visits them. With it the
mean loss is an integral over the logSNR, the same for every schedule with the same ends, and the
schedule changes its variance alone. The re-implementations leave it out; the paper's bound has it,
as far as is known, and so has this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from diffusion_pl.diffusion.objective import Objective
from diffusion_pl.diffusion.weights import SoftMinSNR
from diffusion_pl.objectives.shifted_cosine import ShiftedCosine
from diffusion_pl.objectives.simple_diffusion import SimpleDiffusion


@dataclass(frozen=True)
class SigmoidBound:
    """-1/2 (d logSNR / du) e^b sigmoid(logSNR - b), of the image's squared error.

    Args:
        bias: b; the lower, the less the levels of little noise count.
        schedule: of the training.
    """

    bias: float
    schedule: ShiftedCosine

    def __call__(self, sigma: Tensor) -> Tensor:
        return self.schedule.speed(sigma) / 2 * SoftMinSNR(math.exp(self.bias))(sigma)


def SimplerDiffusion(schedule: ShiftedCosine, bias: float = -3.0, bound: bool = True) -> Objective:
    """Simple diffusion with the sigmoid weight.

    Args:
        schedule: u -> sigma.
        bias: b; -3 is recalled for 512 pixels, -1 to -2 for 128 and 256, none of it verified.
        bound: weigh by -d logSNR / du, so that the schedule does not.
    """
    weight = SigmoidBound(bias, schedule) if bound else SoftMinSNR(math.exp(bias))
    return SimpleDiffusion(schedule, weight=weight)
