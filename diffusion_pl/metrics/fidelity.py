"""torch-fidelity's other extractors: DINOv2 (for FD-DINOv2), CLIP and VGG.

Stein et al. 2023, arXiv 2306.04675: distances over DINOv2 agree best with human judgement.
torch-fidelity downloads the weights at first use. DINOv2's code comes from its authors' repository
through torch.hub and is executed: use it only if you trust it.
"""

import hashlib
import http.client
import warnings

import torch
from torch import Tensor, nn
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from diffusion_pl.errors import UserError
from diffusion_pl.metrics.features import Features, require_rgb

# Inception is loaded in inception.py.
NAMES = tuple(name for name in FEATURE_EXTRACTORS_REGISTRY if not name.startswith("inception"))


class Fidelity(nn.Module):
    """One of torch-fidelity's extractors.

    Args:
        name: torch-fidelity's.
        network: from uint8 images to a tuple of one tensor (B, D).
    """

    classes = 0
    spatial = 0
    precision = "fp32"
    error: float | None = None

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.network = network.requires_grad_(False).eval()
        self.digest = digest(network)
        side = getattr(network, "resolution", getattr(network, "INPUT_IMAGE_SIZE", 224))
        self.resize = f"TensorFlow 1 bilinear to {side} px"
        self.dimension = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).pooled.shape[1]

    def train(self, mode: bool = True) -> "Fidelity":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3 or 1, H, W): pooled (B, D)."""
        images = require_rgb(images)
        with torch.autocast(images.device.type, enabled=False):
            return Features(self.network(images)[0].flatten(1))


def load(name: str, weights: str | None = None) -> Fidelity:
    """Load an extractor by torch-fidelity's name.

    Args:
        name: one of `NAMES`.
        weights: a file of CLIP's weights, in TorchScript, which is code: one that you trust.

    Raises:
        UserError: an unknown name, or weights that are unavailable.
    """
    if name not in NAMES:
        known = ("auto", "inception", "shapes", "pixels", *NAMES)
        raise UserError(f"extractor: name must be one of {', '.join(known)} (got {name!r})")
    # DINOv2 cannot read one, and VGG would execute its pickle.
    if weights is not None and not name.startswith("clip-"):
        raise UserError(f"extractor: {name} reads no file; remove weights={weights!r}")
    kind = FEATURE_EXTRACTORS_REGISTRY[name]
    layers = [kind.get_default_feature_layer_for_metric("fid")]
    options = {"feature_extractor_weights_path": weights, "verbose": False}
    try:
        with warnings.catch_warnings():
            # CLIP's weights are TorchScript, which torch deprecates.
            warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
            network = create_feature_extractor(name, layers, cuda=False, **options)
    # KeyError: a file of another layout.
    except (OSError, RuntimeError, ValueError, KeyError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"extractor: {name}'s weights cannot be had ({reason})") from error
    return Fidelity(name, network)


def digest(network: nn.Module) -> str:
    """First 12 hex digits of the sha256 of all weights, sorted by name."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()[:12]
