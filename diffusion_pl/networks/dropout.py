"""Dropout whose masks belong to the images; see counted.py. It costs less than torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.counted import windows

# Places where a window may begin. Two units of a layer, seen over all windows, are as independent
# as a row of so many choices is: their correlation is 5e-4, its root's inverse.
PLACES = 2**22


class Dropout(nn.Module):
    """Dropout (Srivastava 2014): in training each number is 0 with probability p, or over 1 - p.

    Until `begin` says where the windows of a batch begin it draws from torch's own generator, as
    torch's dropout does. Images that a batch holds several times in a row of batches have one mask.

    Args:
        p: probability, in [0, 1).
    """

    stream = "dropout"

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"dropout must be in [0, 1) (got {p})")
        self.p = p
        self.length = PLACES
        # Neither buffers nor in the state dict: they are made again from the seed.
        self.kept: Tensor | None = None
        self.places: Tensor | None = None

    def row(self, source: torch.Generator) -> Tensor:
        """Independent choices of what stays, bool (2 PLACES,), the second half as the first."""
        return (torch.rand(self.length, generator=source) >= self.p).repeat(2)

    def begin(self, row: Tensor, places: Tensor) -> None:
        """Say what the masks of the next batch are.

        Args:
            row: as `row` makes it; on x's device.
            places: where each image's window begins, int64 (B,), below PLACES; on x's device.
        """
        self.kept, self.places = row, places

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (B, tokens, C) -> the same.

        Raises:
            UserError: neither as many images as `begin` was given, nor a multiple of them.
        """
        if not self.training or not self.p:
            return x
        if self.kept is None or self.places is None:
            return F.dropout(x, self.p, True)
        return x * self.mask(x) * (1 / (1 - self.p))

    def mask(self, x: Tensor) -> Tensor:
        """What of x stays, bool, of its shape.

        Counted along the channels first, as images lie in memory: (B, H, W, C).
        """
        assert self.kept is not None and self.places is not None
        images = x.dim() == 4
        shape = x.permute(0, 2, 3, 1).shape if images else x.shape
        count = shape[1:].numel()
        mask = windows(self.kept, self.places, min(count, PLACES), len(x))
        if count > PLACES:  # more units than places: the row is gone round again
            mask = mask.repeat(1, -(-count // PLACES))[:, :count]
        mask = mask.reshape(shape)
        return mask.permute(0, 3, 1, 2) if images else mask
