"""What every metric looks at: the features that a fixed network, an extractor, sees in images."""

import logging
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class Features(NamedTuple):
    """What an extractor says of a batch; one pass feeds every metric.

    Args:
        pooled: float32 (B, D), what distances compare.
        logits: float32 (B, K), over the extractor's own classes, before the softmax.
    """

    pooled: Tensor
    logits: Tensor


class Extractor(Protocol):
    """A fixed network from images to features: an nn.Module that never trains, without gradients.

    Attributes:
        name: "inception" for the published network alone, since its numbers are called FID and IS.
        digest: the first 12 hex digits of the sha256 of the file of weights.
        dimension: D, the pooled features of an image.
        resize: how an image is brought to the network's input, in one line.
    """

    name: str
    digest: str
    dimension: int
    resize: str

    def __call__(self, images: Tensor, /) -> Features:
        """Features of uint8 images (B, 3, H, W), or of (B, 1, H, W), the channel repeated.

        Raises:
            ValueError: another dtype or number of channels.
        """

    def to(self, device: torch.device | str) -> nn.Module:
        """Move the network, in place."""


def require_rgb(images: Tensor) -> Tensor:
    """Check that images are bytes, and give them three channels.

    A float image has been neither clipped nor rounded: what is measured must be what is saved.

    Args:
        images: uint8 (B, 3, H, W) or (B, 1, H, W).

    Returns:
        uint8 (B, 3, H, W), a view.

    Raises:
        ValueError: another dtype or shape.
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"extractor: images must be uint8 (got {images.dtype}); quantise with images.to_bytes"
        )
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"extractor: images must be (B, 3, H, W) or (B, 1, H, W) (got {tuple(images.shape)})"
        )
    return images.expand(-1, 3, -1, -1)


def load(
    name: Literal["auto", "inception", "shapes"] = "auto", weights: str | None = None
) -> Extractor:
    """Load the extractor that an experiment names.

    Args:
        name: "inception", the network of FID and IS; "shapes", the small one that comes with the
            package; "auto", Inception where its weights can be had, else the small one, which one
            line of the log then says.
        weights: file of Inception weights; torch's hub cache, then the download, when not given.

    Returns:
        The extractor, on the CPU.

    Raises:
        ValueError: the weights cannot be had or are unfit; never for "auto" without `weights`.
    """
    # Imported here: both files import this one, and Inception brings torchvision, 2 s of CPU.
    from diffusion_pl.metrics import inception, shapes

    if name not in ("auto", "inception", "shapes"):
        raise ValueError(f"extractor: name must be auto, inception or shapes (got {name!r})")
    if name == "shapes":
        if weights is not None:
            raise ValueError(f"extractor: shapes has its own weights; remove weights={weights!r}")
        return shapes.load()
    if name == "inception" or weights is not None:
        return inception.load(weights)
    try:
        return inception.load()
    except ValueError as error:
        logger.warning("%s; going on with the embedded extractor, whose numbers are no FID", error)
        return shapes.load()
