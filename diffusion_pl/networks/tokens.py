"""What transformers over patches share: normalisation, modulation, and where a patch lies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError


class RMSNorm(nn.Module):
    """Divides by the root mean square over the channels, in float32, times a learned weight.

    Args:
        width: channels.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> float32 of the same shape (Zhang & Sennrich 2019, arXiv:1910.07467)."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def check_heads(width: int, heads: int) -> None:
    """Raise UserError unless `rotary_table` fits an attention of so many heads."""
    if width % (4 * heads):
        raise UserError(
            f"width must be a multiple of 4 heads, for two coordinates in pairs of channels "
            f"(got {width} for {heads} heads)"
        )


def check_sides(height: int, width: int, patch_size: int) -> None:
    """Raise UserError unless patches cover an image of these sides, pixels."""
    if height % patch_size or width % patch_size:
        raise UserError(
            f"the sides of the images must be multiples of patch_size, {patch_size} "
            f"(got {height} x {width})"
        )


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift: (B, tokens, width), twice (B, 1, width) -> (B, tokens, width)."""
    return torch.addcmul(x + shift, x, scale)


def patch_table(width: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Sinusoids of each patch's column, then row; of each [sin, cos] of n 10000^(-k / (width / 4)).

    The fixed table of MAE (arXiv:2111.06377) and DiT, for whole patches n = 0, 1, ...

    Returns:
        float32 (rows * columns, width), row by row.
    """
    row, column = _grid(rows, columns, width // 4, device)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


def rotary_table(width: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """cos and sin of the angles by which `rotated` turns each patch's pairs of channels.

    The first half of the pairs turns by row f_k, the second by column f_k, with
    f_k = 10000^(-4 k / width), k = 0 .. width / 4 - 1 (rotary positions: Su 2021,
    arXiv:2104.09864; on two axes as in EVA-02, arXiv:2303.11331).

    Args:
        width: channels of an attention head, a multiple of 4.

    Returns:
        float32 (2, rows * columns, width / 2), row by row.
    """
    angles = torch.cat(_grid(rows, columns, width // 4, device), dim=1)
    return torch.stack([angles.cos(), angles.sin()])


def unrotated(tokens: int, rotary: Tensor) -> Tensor:
    """The table with tokens in front that have no place and do not turn."""
    front = torch.zeros_like(rotary[..., :1, :]).repeat_interleave(tokens, dim=-2)
    front[0] = 1  # cos 0
    return torch.cat([front, rotary], dim=-2)


def chosen(rotary: Tensor, kept: Tensor) -> Tensor:
    """The rows of some patches, (2, N, width / 2), int64 (B, K) -> (2, B, 1, K, width / 2)."""
    return rotary[:, kept].unsqueeze(2)


def rotated(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn neighbouring channels (2 j, 2 j + 1) by the j-th angle of each token.

    Args:
        x: queries or keys (B, heads, tokens, width).
        rotary: cos and sin, (2, tokens, width / 2), or (2, B, 1, tokens, width / 2).

    Returns:
        float32 of x's shape.
    """
    pairs, (cos, sin) = x.float().unflatten(-1, (-1, 2)), rotary
    if torch.compiler.is_compiling():  # which has no code for complex numbers
        even, odd = pairs.unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    # Four times as fast as the products one by one.
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)


def _grid(rows: int, columns: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each patch times `count` frequencies, each (rows * columns, count)."""
    exponent = torch.arange(count, dtype=torch.float64, device=device) / count
    frequency = 10000.0**-exponent
    row = torch.arange(rows, dtype=torch.float64, device=device)
    column = torch.arange(columns, dtype=torch.float64, device=device)
    phases = row[:, None, None].expand(-1, columns, -1), column[None, :, None].expand(rows, -1, -1)
    first, second = ((phase * frequency).flatten(0, 1).float() for phase in phases)
    return first, second
