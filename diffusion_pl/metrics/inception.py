"""The Inception network of FID and IS, with its weights read safely.

Szegedy et al. 2015 as released by TensorFlow on 2015-12-05, ported by torch-fidelity: images are
resized by TensorFlow 1's bilinear filter (no half-pixel centres), then (x - 128) / 128. The batch
norms are folded into the convolutions: equal to 1e-6, and 1.7 times as fast with channels_last.
"""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from diffusion_pl.errors import UserError
from diffusion_pl.io.download import fetch
from diffusion_pl.io.files import regular
from diffusion_pl.metrics.features import Features, require_rgb

# sha256 of the published file.
PUBLISHED = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

FILE = "weights-inception-2015-12-05-6726825d.pth"

# Of each attempt to connect or read: runs must start without a network, too.
TIMEOUT_SECONDS = 10.0


class Inception(nn.Module):
    """The published network, or one with other weights, which has another name.

    The spatial features are those of sFID: the first 7 channels of the 1 x 1 branch of TensorFlow's
    mixed_6, at 17 x 17 positions, channels last as in ADM's published moments.

    Args:
        network: torch-fidelity's, with outputs "2048" and "logits_unbiased"; changed in place.
        sha256: of the file of weights, hex.
        precision: "fp32" or "bf16".
    """

    dimension = 2048
    classes = 1008
    spatial = 17 * 17 * 7
    resize = "TensorFlow 1 bilinear to 299 px"

    def __init__(
        self, network: FeatureExtractorInceptionV3, sha256: str, precision: str = "fp32"
    ) -> None:
        super().__init__()
        fold(network)
        self.network = network.requires_grad_(False).eval()
        self.network.to(memory_format=torch.channels_last)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self._seen: Tensor | None = None
        self.precision = precision
        self.error: float | None = None
        self.digest = sha256[:12]
        self.name = "inception" if sha256 == PUBLISHED else f"inception-{sha256[:8]}"

    def train(self, mode: bool = True) -> "Inception":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3 or 1, H, W): pooled (B, 2048), logits (B, 1008).

        The logits are without the bias of the last layer, as IS has been computed since 2016.
        """
        if self.precision == "fp32":
            return self._features(images, in_bf16=False)
        features = self._features(images, in_bf16=True)
        if self.error is None:
            exact = self._features(images, in_bf16=False).pooled
            squares = (features.pooled - exact).square().mean() / exact.square().mean()
            self.error = squares.sqrt().item()
        return features

    @torch.no_grad()
    def _features(self, images: Tensor, *, in_bf16: bool) -> Features:
        images = require_rgb(images).contiguous(memory_format=torch.channels_last)
        # Independent of the precision of the model that is evaluated.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=in_bf16):
            pooled, logits = self.network(images)
        seen, self._seen = self._seen, None
        assert seen is not None
        return Features(pooled, logits, seen.permute(0, 2, 3, 1).flatten(1).float())

    def _keep_spatial(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen = output[:, :7]


def fold(network: nn.Module) -> None:
    """Fold every batch norm into the convolution before it, in place.

    gamma (W x - mean) / sqrt(var + eps) + beta = (s W) x + (beta - s mean), s = gamma / sqrt(...).
    """
    for module in network.modules():
        norm, convolution = getattr(module, "bn", None), getattr(module, "conv", None)
        if isinstance(norm, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d):
            assert norm.running_mean is not None and norm.running_var is not None
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            offset = norm.bias.double() - scale * norm.running_mean.double()
            weight = convolution.weight.double() * scale[:, None, None, None]
            convolution.weight = nn.Parameter(weight.float(), requires_grad=False)
            convolution.bias = nn.Parameter(offset.float(), requires_grad=False)
            module.bn = nn.Identity()


def load(weights: str | None = None, precision: str = "fp32") -> Inception:
    """Load the network.

    Args:
        weights: file of a state dict in torch-fidelity's layout; by default the published one,
            from torch's hub cache or downloaded.
        precision: "fp32" or "bf16".

    Raises:
        UserError: the weights are unavailable, damaged or of another layout.
    """
    return Inception(*opened(weights), precision)


def opened(weights: str | None) -> tuple[FeatureExtractorInceptionV3, str]:
    """torch-fidelity's network with the weights of a file, and the file's sha256 (hex).

    Raises:
        UserError: as `load`.
    """
    path = Path(weights) if weights is not None else published()
    try:
        content = regular(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read Inception's weights ({error.strerror})") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if weights is None and sha256 != PUBLISHED:
        raise UserError(f"{path}: not the published Inception (sha256 {sha256[:8]}); delete it")
    return _network(content, path), sha256


def published() -> Path:
    """The published weights in torch's hub cache, downloaded if absent."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path.exists():
        download(URL_INCEPTION_V3, path, PUBLISHED)
    return path


def download(url: str, path: Path, sha256: str) -> None:
    """Download a file to a path, created only if its sha256 (hex) is right.

    Raises:
        UserError: the file cannot be downloaded or has another digest.
    """
    try:
        fetch(url, path, sha256, attempts=2, timeout=TIMEOUT_SECONDS)
    except ValueError as error:
        raise UserError(
            f"Inception's weights cannot be fetched: {error}; or name the file as weights"
        ) from error


def _network(content: bytes, path: Path) -> FeatureExtractorInceptionV3:
    """torch-fidelity's network with weights that were read without executing their pickle."""
    try:
        state: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: Inception's weights cannot be read ({reason})") from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise UserError(f"{path}: not Inception's layout (not a dictionary of named tensors)")
    # torch-fidelity unpickles its file in full, so it gets a copy of the tensors read above.
    copy = io.BytesIO()
    torch.save(dict(state), copy)
    copy.seek(0)
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=copy,
        )
    except RuntimeError as error:
        raise UserError(f"{path}: not Inception's layout ({_first_problem(error)})") from error


def _first_problem(error: RuntimeError) -> str:
    """The first key or shape in the message of torch's strict loading."""
    lines = [line.strip() for line in str(error).splitlines()]
    problem = lines[1] if len(lines) > 1 else lines[0]
    return problem.partition('", "')[0].replace('"', "").rstrip(". ")
