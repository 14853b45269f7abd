"""Softmax attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Keys below which the CPU's backward pass in bfloat16 loses to float32's: measured with AMX, 3 to
# 15 times slower up to 128 keys, equal from 256.
FEW = 256


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(channels)) v.

    Args:
        q: queries, (B, heads, N, channels).
        k, v: keys and values, (B, heads, M, channels).
        mask: true where a query sees a key, spreads to (B, heads, N, M); None: everywhere.

    Returns:
        (B, heads, N, channels).
    """
    learns = torch.is_grad_enabled() and q.requires_grad
    if learns and q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] < FEW:
        with torch.autocast("cpu", enabled=False):
            wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
            return wide.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
