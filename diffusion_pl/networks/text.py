"""Text as a condition: token states of a frozen encoder as further keys and values of attention.

The image's queries attend to image and text in one softmax. Tokens of the text have no place in the
image and are not updated. So it is in PRX (Photoroom, 2025; released code), in GLIDE (Nichol 2021,
arXiv:2112.10741, section 3) and in Imagen's networks up to 256 pixels (Saharia 2022,
arXiv:2205.11487; recalled, not verified).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.attention import attention
from diffusion_pl.networks.tokens import RMSNorm


class Text(NamedTuple):
    """The texts of a batch, each of at least one token.

    Args:
        tokens: (B, L, width), finite everywhere.
        mask: bool (B, L), True where there is a token.
    """

    tokens: Tensor
    mask: Tensor

    def through(self, layer: nn.Module) -> Text:
        """The same texts, their tokens through a layer."""
        return self._replace(tokens=layer(self.tokens))


class TextKeys(nn.Module):
    """Makes keys and values of a text's tokens by one linear map.

    Args:
        text_width: channels of a token.
        width: channels of the attention, a multiple of `heads`.
        heads: attention heads.
        normed: keys are RMS-normalised over a head's channels, where the image's are too.
        bias: whether the map has biases.
    """

    def __init__(
        self, text_width: int, width: int, heads: int, *, normed: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kv = nn.Linear(text_width, 2 * width, bias=bias)
        nn.init.xavier_uniform_(self.kv.weight)
        if bias:
            nn.init.zeros_(self.kv.bias)
        self.norm_k = RMSNorm(width // heads) if normed else None

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, text_width) -> keys and values, each (B, heads, L, width / heads)."""
        k, v = self.kv(tokens).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return k if self.norm_k is None else self.norm_k(k), v


def attended(
    q: Tensor, k: Tensor, v: Tensor, text: Text | None = None, keys: nn.Module | None = None
) -> Tensor:
    """What queries make of the image's keys and values, and of a text's, softmax in float32.

    Args:
        q, k, v: of the image, (B, heads, N, channels).
        text: its tokens as `keys` takes them; None for the image alone.
        keys: makes keys and values of tokens, such as `TextKeys`.

    Returns:
        (B, heads, N, channels).
    """
    if text is None or keys is None:
        return attention(q, k, v)
    text_k, text_v = (each.to(v.dtype) for each in keys(text.tokens))
    # One row for all queries and heads, which attention spreads without a copy.
    mask = F.pad(text.mask, (k.shape[2], 0), value=True)[:, None, None]
    k, v = torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2)
    return attention(q, k, v, mask)


def fitting(text: Tensor, mask: Tensor, images: int, width: int) -> tuple[Tensor, Tensor]:
    """A condition as it was given, if it is one for so many images.

    Raises:
        UserError: tokens that are not (images, L, width), or a mask that is not bool (images, L).
    """
    if text.ndim != 3 or text.shape[0] != images or text.shape[2] != width:
        raise UserError(
            f"text must be the token states of {images} texts, (B, L, {width}), for a network with "
            f"text_width: {width} (got {tuple(text.shape)})"
        )
    if mask.shape != text.shape[:2] or mask.dtype != torch.bool:
        raise UserError(
            f"text_mask must be bool {tuple(text.shape[:2])}, one for each token (got {mask.dtype} "
            f"{tuple(mask.shape)})"
        )
    return text, mask
