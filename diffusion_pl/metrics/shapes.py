"""The embedded extractor: a small classifier of the synthetic shapes, without a download.

Its distances rank runs on the same data; they are not FID and never called so.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from torch import Tensor, nn
from torch.nn import functional

from diffusion_pl.errors import UserError
from diffusion_pl.images import from_bytes
from diffusion_pl.io.files import regular
from diffusion_pl.metrics.features import Features, require_rgb

WEIGHTS = Path(__file__).with_name("shapes.safetensors")

SIDE = 32  # of the network's input, pixels


def _block(channels_in: int, channels_out: int, *, stride: int = 1) -> nn.Sequential:
    """Convolution 3 x 3, batch norm, ReLU.

    Batch norm, not group norm: its statistics are frozen, so an image's contrast, which noise and
    blur change, is not normalised away.
    """
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class ShapesNetwork(nn.Module):
    """About 180,000 parameters; the pooled features are texture (32) and shape (96)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.texture = _block(3, 32)
        self.shape = nn.Sequential(
            _block(32, 48, stride=2),
            _block(48, 64),
            _block(64, 96, stride=2),
            _block(96, 96),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Features:
        """Features of float32 images (B, 3, 32, 32) in [-1, 1]; pooled is (B, 128), at least 0."""
        texture = self.texture(x)
        # Two depths: the last layer alone loses texture.
        pooled = torch.cat([level.mean(dim=(2, 3)) for level in (texture, self.shape(texture))], 1)
        return Features(pooled, self.head(pooled))


def resize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to area means (B, 3, 32, 32) in [-1, 1].

    An exact box filter at integer ratios; smaller images repeat pixels.
    """
    x = from_bytes(images)
    return x if x.shape[2:] == (SIDE, SIDE) else functional.adaptive_avg_pool2d(x, SIDE)


class Shapes(nn.Module):
    """The embedded extractor.

    Args:
        network: the trained classifier.
        digest: of its file of weights, 12 hex digits.
    """

    name = "shapes"
    dimension = 128
    spatial = 0
    resize = f"area to {SIDE} px"
    precision = "fp32"
    error: float | None = None

    def __init__(self, network: ShapesNetwork, digest: str) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.network.to(memory_format=torch.channels_last)  # a third faster
        self.classes = network.head.out_features
        self.digest = digest

    def train(self, mode: bool = True) -> "Shapes":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3 or 1, H, W), any size; see `Extractor`."""
        images = require_rgb(images)
        # Independent of the precision of the model that is evaluated.
        with torch.autocast(images.device.type, enabled=False):
            x = resize(images).contiguous(memory_format=torch.channels_last)
            return Features(*self.network(x))


def load(path: Path = WEIGHTS) -> Shapes:
    """Load the embedded extractor.

    Args:
        path: safetensors file of a `ShapesNetwork`.

    Raises:
        UserError: absent, or other weights.
    """
    try:
        content = regular(path).read_bytes()
        state = parse(content)
        network = ShapesNetwork(classes=len(state["head.bias"]))
        network.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not the embedded extractor's weights ({reason})") from error
    return Shapes(network, hashlib.sha256(content).hexdigest()[:12])
