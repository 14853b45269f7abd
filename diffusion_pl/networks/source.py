"""A source image beside the noisy one, as further input channels: SR3's low-resolution image
(Saharia 2021, arXiv:2104.07636), Palette's masked or grey one (Saharia 2021, arXiv:2111.05826)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_pl.errors import UserError


def beside_source(
    x: Tensor, source: Tensor | None, mask: Tensor | None, image: Tensor, channels: int
) -> Tensor:
    """Append the known pixels of a source image, 0 where there is none, and the mask, 1 and 0.

    Args:
        x: what the network's input has otherwise, (B, C', H, W).
        source: (B, channels, H, W) in [-1, 1]; None for no image.
        mask: bool (B, 1, H, W), True where a pixel of `source` is known; what it holds elsewhere
            never matters.
        image: the noisy images (B, C, H, W).
        channels: of a source image; 0 for a network that takes none.

    Returns:
        (B, C' + channels + 1, H, W); `x` itself with 0 channels.

    Raises:
        UserError: one of the two without the other, another shape, or an image that is not taken.
    """
    if (source is None) != (mask is None):
        raise UserError("source and source_mask must be given together, or neither")
    if not channels:
        if source is not None:
            raise UserError("source images were given to a network without them, image_channels: 0")
        return x
    count, _, *sides = image.shape
    if source is None or mask is None:
        return torch.cat([x, x.new_zeros(count, channels + 1, *sides)], dim=1)
    known = (count, 1, *sides)
    if source.shape != (count, channels, *sides) or mask.shape != known or mask.dtype != torch.bool:
        raise UserError(
            f"a source image must be {(count, channels, *sides)}, as large as the noisy one, and "
            f"its mask bool {known} (got {tuple(source.shape)} and {mask.dtype} "
            f"{tuple(mask.shape)})"
        )
    shown = torch.where(mask, source.to(x.dtype), 0)
    return torch.cat([x, shown, mask.to(x.dtype)], dim=1)
