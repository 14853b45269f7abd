"""Dropout whose masks belong to the images: image i's masks come from (seed, i, layer) alone.

So they depend neither on how many images a device takes at once nor on how many devices there are,
nor on whether the network is compiled. A layer holds one long row of independent choices, made once
from the seed; an image's mask is the window of it that begins at the image's own place. Finding the
place is the only thing counted an image, and a window is copied, not drawn: that costs less than
torch's own dropout.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError

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

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"dropout must be in [0, 1) (got {p})")
        self.p = p
        self.row = PLACES
        # Neither buffers nor in the state dict: they are made again from the seed.
        self.kept: Tensor | None = None
        self.places: Tensor | None = None

    def begin(self, kept: Tensor, places: Tensor) -> None:
        """Say what the masks of the next batch are.

        Args:
            kept: the choices, bool (2 PLACES,), the second half as the first; on x's device.
            places: where each image's window begins, int64 (B,), below PLACES; on x's device.
        """
        self.kept, self.places = kept, places

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
        window = min(count, PLACES)
        # Every window there is, without memory of its own.
        windows = self.kept.as_strided((PLACES, window), (1, 1))
        places = self.places
        if len(x) != len(places):  # a batch seen several times over, as guidance sees one
            if len(x) % len(places):
                raise UserError(f"dropout has masks for {len(places)} images (got {len(x)})")
            places = places.repeat(len(x) // len(places))
        mask = windows.index_select(0, places)
        if count > window:  # more units than places: the row is gone round again
            mask = mask.repeat(1, -(-count // window))[:, :count]
        mask = mask.reshape(shape)
        return mask.permute(0, 3, 1, 2) if images else mask
