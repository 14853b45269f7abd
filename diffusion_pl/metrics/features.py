"""Features of images: the extractor's interface, shared by all metrics."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffusion_pl.errors import UserError

# Batch size of extractors. A network's last digits depend on it, so it is independent of the batch
# size of sampling and the number of devices; see `ranks.rank_range`.
TILE = 32


class Features(NamedTuple):
    """What metrics get of a batch: the output of an extractor, and what it was made of.

    Args:
        pooled: float32 (B, D), for distances.
        logits: float32 (B, K), over the extractor's classes; None without classes.
        spatial: float32 (B, S), activations by position; None without them.
        images: uint8 (B, C, H, W), the batch itself, from an evaluation.
        captions: what each image was asked to show, for metrics that want captions.
    """

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None
    images: Tensor | None = None
    captions: tuple[str, ...] | None = None


class Extractor(Protocol):
    """A fixed network from images to features: an nn.Module that never trains, without gradients.

    Attributes:
        name: "inception" only for the published network, whose values are called FID and IS.
        digest: first 12 hex digits of the sha256 of the weights.
        dimension: D, number of pooled features.
        classes: K, 0 for none.
        spatial: S, 0 for none.
        resize: how images are resized to the network's input, in one line.
        precision: "fp32" or "bf16".
        error: relative root-mean-square error of bf16 in the pooled features, measured on the
            first images; None for "fp32".
    """

    name: str
    digest: str
    dimension: int
    classes: int
    spatial: int
    resize: str
    precision: str
    error: float | None

    def __call__(self, images: Tensor, /) -> Features:
        """Features of uint8 images (B, 3, H, W), or of (B, 1, H, W), the channel repeated.

        Raises:
            UserError: another dtype or number of channels.
        """

    def to(self, device: torch.device | str) -> nn.Module:
        """Move the network, in place."""


def require_rgb(images: Tensor) -> Tensor:
    """Convert images to three channels; floats, neither clipped nor rounded, are refused.

    Args:
        images: uint8 (B, C, H, W), C of 1, 3 or 4; a fourth channel is alpha, composed over white.

    Returns:
        uint8 (B, 3, H, W), a view unless C is 4.

    Raises:
        UserError: another dtype or shape.
    """
    if images.dtype != torch.uint8:
        raise UserError(
            f"extractor: images must be uint8 (got {images.dtype}); quantise with images.to_bytes"
        )
    if images.dim() != 4 or images.shape[1] not in (1, 3, 4):
        raise UserError(
            f"extractor: images must be (B, C, H, W) with C of 1, 3 or 4 (got "
            f"{tuple(images.shape)})"
        )
    if images.shape[1] == 4:
        colours, alpha = images.to(torch.int32).tensor_split([3], dim=1)
        return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
    return images.expand(-1, 3, -1, -1)


@torch.no_grad()
def tile(extractor: Extractor, images: Tensor) -> Features:
    """Features of up to TILE images, padded with the last one to a batch of TILE.

    So equal images have equal features: in a smaller batch the last digits would differ.

    Args:
        extractor: the network.
        images: uint8 (n, C, H, W), n from 1 to TILE.
    """
    count = len(images)
    rest = images[-1:].expand(TILE - count, *images.shape[1:])
    seen = extractor(torch.cat([images, rest]) if count < TILE else images)
    logits = None if seen.logits is None else seen.logits[:count]
    spatial = None if seen.spatial is None else seen.spatial[:count]
    return Features(seen.pooled[:count], logits, spatial)
