"""Where a pixel lies in the full frame, as further input channels (Ryu & Ye 2022).

Coordinates are those of the full-resolution grid, k / (D - 1), resized together with the image and
encoded afterwards; they are never noised. Their spacing is what tells a network the scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.positions import coordinates


class PositionEncoding(nn.Module):
    """Appends sin(pi 2^k c) and cos(pi 2^k c), k = 0 .. L - 1, of both coordinates c.

    Args:
        position_frequencies: L; 0 appends nothing.
        frame: D, side of the full-resolution grid, for images that come without a position.
    """

    def __init__(self, position_frequencies: int, frame: int) -> None:
        super().__init__()
        self.position_frequencies = position_frequencies
        self.frame = frame

    @property
    def channels(self) -> int:
        """How many channels are appended, 4 L."""
        return 4 * self.position_frequencies

    def forward(self, x: Tensor, position: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, C + 4 L, H, W).

        Args:
            x: preconditioned noisy images.
            position: coordinates in [0, 1] over the full frame, (B, 2, H, W) or (2, H, W), row then
                column; None where x is the whole image.

        Raises:
            UserError: a position given to a network that reads none.
        """
        if not self.position_frequencies:
            if position is not None:
                raise UserError(
                    "positions were given to a network without them (position_frequencies: 0)"
                )
            return x
        if position is None:
            position = coordinates(x.shape[2], x.shape[3], self.frame, x.device)
        octave = 2.0 ** torch.arange(
            self.position_frequencies, dtype=torch.float32, device=x.device
        )
        phase = math.pi * octave[:, None, None, None] * position.to(torch.float32).unsqueeze(-4)
        waves = torch.stack([phase.sin(), phase.cos()], dim=-5).flatten(-5, -3)
        return torch.cat([x, waves.to(x.dtype).expand(x.shape[0], -1, -1, -1)], dim=1)
