"""What every metric looks at: the features that a fixed network, an extractor, sees in images."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffusion_pl.errors import UserError

# Images that an extractor sees at a time. A network's last digits depend on its batch, so it is the
# same whatever the number of images drawn at a time and of devices; see `ranks.rank_range`.
TILE = 32


class Features(NamedTuple):
    """What an extractor says of a batch; one pass feeds every metric.

    Args:
        pooled: float32 (B, D), what distances compare.
        logits: float32 (B, K), over the extractor's own classes, before the softmax; None for an
            extractor that knows no classes.
        spatial: float32 (B, S), activations at places of the image; None where there are none.
    """

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class Extractor(Protocol):
    """A fixed network from images to features: an nn.Module that never trains, without gradients.

    Attributes:
        name: "inception" for the published network alone, since its numbers are called FID and IS.
        digest: the first 12 hex digits of the sha256 of the file of weights.
        dimension: D, the pooled features of an image.
        classes: K, 0 for none.
        spatial: S, 0 for none.
        resize: how an image is brought to the network's input, in one line.
        precision: what it computes in, "fp32" or "bf16".
        error: root mean square of what that changes in the pooled features, over their own,
            measured on the first images seen; None for "fp32".
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
    """Check that images are bytes, and give them three channels.

    A float image has been neither clipped nor rounded: what is measured must be what is saved.

    Args:
        images: uint8 (B, 3, H, W), (B, 1, H, W) or (B, 4, H, W), whose fourth channel is taken for
            alpha: they are seen laid over white, as pictures are read as RGB.

    Returns:
        uint8 (B, 3, H, W), a view but for four channels.

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
    """Features of up to TILE images, always seen TILE at a time: equal images have equal features.

    A short tile is filled with its last image; alone, an image would have other last digits than
    its copy in a full one, and distances between them would not be zero.

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
