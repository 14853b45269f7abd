"""A weight learned in training (Karras 2024, arXiv:2312.02696, Eq. 21).

    L' = L / e^{u(sigma)} + u(sigma)

is smallest where e^u is the expected loss L of the level, so every level comes to weigh the same
in the gradient, whatever its loss. u is a linear function of Fourier features of ln(sigma) / 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffusion_pl.diffusion.objective import Denoise, ObjectiveAround, TrainingObjective


class LearnedUncertainty(ObjectiveAround):
    """An objective whose loss is divided by a learned estimate of itself.

    The estimate is of an image's loss, the paper's of a pixel's: the gradient is the paper's
    divided by C H W, which Adam does not notice. It begins at u = 0, the plain loss.

    Args:
        objective: what is trained; its loss is at least 0.
        channels: Fourier features, 128 in the released code.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(self, objective: TrainingObjective, channels: int = 128) -> None:
        super().__init__(objective)
        # Buffers: drawn once and kept, like weights, but not trained.
        self.register_buffer("frequency", torch.randn(channels))
        self.register_buffer("phase", torch.rand(channels))
        self.weight = nn.Parameter(torch.zeros(channels))

    def log_loss(self, sigma: Tensor) -> Tensor:
        """u, the estimated logarithm of the loss at some levels: (B,) -> float32 (B,)."""
        # EDM's c_noise, not the objective's: a timestep up to 1000 would spin the features.
        level = (sigma.log() / 4).to(torch.float32)
        waves = torch.cos(2 * math.pi * (level[:, None] * self.frequency + self.phase))
        # Products and a sum, no matrix product: autocast leaves them in float32.
        return (self.weight * math.sqrt(2) * waves).sum(dim=1)

    def loss(
        self, denoise: Denoise, image: Tensor, u: Tensor, noise: Tensor, **condition: Tensor | None
    ) -> Tensor:
        """The loss of each image, float32 (B,); may be negative. See `Objective.loss`."""
        loss = self.objective.loss(denoise, image, u, noise, **condition)
        log_loss = self.log_loss(self.schedule(u))
        return loss * torch.exp(-log_loss) + log_loss
