"""Frozen networks from images to maps of features with gradient, for `diffusion/extra.py`.

Each names its network; the weights are read when training starts. Images are float32 in [-1, 1]
with 3 channels, or 1 that is repeated.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import math
import pickle
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_pl.errors import UserError
from diffusion_pl.io.files import regular
from diffusion_pl.metrics import shapes

RGB = (1, 3)


@dataclass(frozen=True)
class Shapes:
    """The embedded classifier of shapes: texture (32, 32, 32), then shape (96, 8, 8).

    Images are resized to 32 pixels by their area.
    """

    image_channels: ClassVar[tuple[int, ...]] = RGB

    def outline(self, channels: int, resolution: int) -> Sequence[tuple[int, ...]]:
        """The shapes of the maps."""
        return (32, shapes.SIDE, shapes.SIDE), (96, shapes.SIDE // 4, shapes.SIDE // 4)

    def check_weights(self) -> None:
        """They are in the package."""

    def load(self) -> nn.Module:
        """The network; see `FeatureMaps`."""
        return ShapesMaps(shapes.load().network)


class ShapesMaps(nn.Module):
    """Both depths of the embedded classifier.

    Args:
        network: the trained classifier.
    """

    def __init__(self, network: shapes.ShapesNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 1 or 3, H, W) to texture (B, 32, 32, 32) and shape (B, 96, 8, 8)."""
        x = functional.adaptive_avg_pool2d(images.expand(-1, 3, -1, -1), shapes.SIDE)
        texture = self.network.texture(x)
        return texture, self.network.shape(texture)


# Shape of what each layer of torch-fidelity's Inception gives, in its order.
INCEPTION = {
    "Conv2d_1a_3x3": (32, 149, 149),
    "Conv2d_2a_3x3": (32, 147, 147),
    "Conv2d_2b_3x3": (64, 147, 147),
    "MaxPool_1": (64, 73, 73),
    "Conv2d_3b_1x1": (80, 73, 73),
    "Conv2d_4a_3x3": (192, 71, 71),
    "MaxPool_2": (192, 35, 35),
    "Mixed_5b": (256, 35, 35),
    "Mixed_5c": (288, 35, 35),
    "Mixed_5d": (288, 35, 35),
    "Mixed_6a": (768, 17, 17),
    "Mixed_6b": (768, 17, 17),
    "Mixed_6c": (768, 17, 17),
    "Mixed_6d": (768, 17, 17),
    "Mixed_6e": (768, 17, 17),
    "Mixed_7a": (1280, 8, 8),
    "Mixed_7b": (2048, 8, 8),
    "Mixed_7c": (2048, 8, 8),
}


@dataclass(frozen=True)
class Inception:
    """The network of FID (`metrics/inception.py`), its images resized to 299 pixels as there.

    A model that is trained on it is no longer measured by it: its FID says less.

    Args:
        layers: names of torch-fidelity's layers, in the order of the network.
        weights: file of weights; by default the published one, from torch's hub cache, else the
            download.

    Raises:
        UserError: an unknown layer.
    """

    layers: Sequence[str] = ("Mixed_6e",)
    weights: str | None = None

    image_channels: ClassVar[tuple[int, ...]] = RGB

    def __post_init__(self) -> None:
        _check_layers("Inception", self.layers, list(INCEPTION))

    def outline(self, channels: int, resolution: int) -> Sequence[tuple[int, ...]]:
        """The shapes of the maps."""
        return [INCEPTION[name] for name in INCEPTION if name in self.layers]

    def check_weights(self) -> None:
        """Raise UserError if a file of weights is named and is not there."""
        if self.weights is not None and not Path(self.weights).exists():
            from diffusion_pl.metrics import inception

            raise UserError(
                f"extractor: {self.weights}: Inception's weights are not there; leave weights out "
                f"for the published file, {inception.URL_INCEPTION_V3} (sha256 "
                f"{inception.PUBLISHED})"
            )

    def load(self) -> nn.Module:
        """The network; see `FeatureMaps`."""
        from diffusion_pl.metrics import inception

        self.check_weights()
        network, _ = inception.opened(self.weights)
        inception.fold(network)
        last = max(list(INCEPTION).index(name) for name in self.layers)
        kept = {name: network.get_submodule(name) for name in list(INCEPTION)[: last + 1]}
        return InceptionMaps(nn.ModuleDict(kept), tuple(self.layers))


class InceptionMaps(nn.Module):
    """The first layers of Inception, in order.

    Args:
        network: by name.
        layers: those that give a map.
    """

    def __init__(self, network: nn.ModuleDict, layers: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.layers = layers

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 1 or 3, H, W) to the layers' maps."""
        from torch_fidelity.interpolate_compat_tensorflow import (
            interpolate_bilinear_2d_like_tensorflow1x,
        )

        levels = (images.expand(-1, 3, -1, -1) + 1) * 127.5  # of 0 to 255
        x = interpolate_bilinear_2d_like_tensorflow1x(levels, (299, 299), align_corners=False)
        x = (x - 128) / 128
        maps = []
        for name, layer in self.network.items():
            x = layer(x)
            if name in self.layers:
                maps.append(x)
        return tuple(maps)


@dataclass(frozen=True)
class Torchvision:
    """A classifier of torchvision's with published weights in a file; nothing is downloaded.

    LPIPS's layers of `vgg16` are features.3, features.8, features.15, features.22, features.29.
    Transformers need `side`, such as 224; their tokens become a map without the class token.

    Args:
        model: torchvision's name, such as vgg16, resnet50 or vit_b_16.
        layers: dotted names in the model, of what gives (B, C, h, w) or (B, tokens, C).
        weights: file of weights; by default the published one in torch's hub cache.
        sha256: of the file, at least its first 8 hex digits; by default those that the names of the
            model's published files end in.
        side: to which images are resized, pixels; None: as they are.

    Raises:
        UserError: an unknown model, no layers, or a digest that is too short.
    """

    model: str
    layers: Sequence[str]
    weights: str | None = None
    sha256: str | None = None
    side: int | None = None

    image_channels: ClassVar[tuple[int, ...]] = RGB

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("extractor: name at least one of the model's layers")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{8,64}", self.sha256):
            raise UserError(
                f"extractor: sha256 must be 8 to 64 hex digits in lower case (got {self.sha256!r})"
            )
        if self.side is not None and self.side < 1:
            raise UserError(f"extractor: side must be at least 1 pixel (got {self.side})")

    def outline(self, channels: int, resolution: int) -> Sequence[tuple[int, ...]]:
        """The shapes of the maps, computed on torch's meta device.

        Raises:
            UserError: an unknown model or layer, or images that do not fit it.
        """
        images = torch.zeros(1, channels, resolution, resolution, device="meta")
        try:
            with torch.no_grad():
                maps = self._maps(self._model())(images)
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            size = f"{channels} x {resolution} x {resolution}"
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"extractor: {self.model} cannot take images of {size} ({reason}); set side, such "
                "as 224"
            ) from error
        return [tuple(each.shape[1:]) for each in maps]

    def check_weights(self) -> None:
        """Raise UserError unless the file is there; says where to get it, and its digest."""
        path = self._path()
        if not path.is_file():
            digest = next(iter(self._digests()), "digits that are not published")
            raise UserError(
                f"extractor: {path}: the weights of torchvision's {self.model} are not there; get "
                f"{self._addresses()[0]} (its sha256 begins with {digest}) and name the file as "
                "weights"
            )

    def load(self) -> nn.Module:
        """The network; see `FeatureMaps`.

        Raises:
            UserError: the file is missing, of another digest, or of another model.
        """
        self.check_weights()
        path, digests = self._path(), self._digests()
        content = regular(path).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if not any(found.startswith(each) for each in digests):
            raise UserError(
                f"extractor: {path}: has the sha256 {found}, not {' or '.join(digests)}...; get "
                f"{self._addresses()[0]}, or set sha256 if you trust this file"
            )
        model = self._model()
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            model.load_state_dict(state, assign=True)
        except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"extractor: {path}: holds no weights of torchvision's {self.model} ({reason})"
            ) from error
        return self._maps(model)

    def _model(self) -> nn.Module:
        """The model on torch's meta device."""
        from torchvision import models

        known = models.list_models(module=models)
        if self.model not in known:
            near = difflib.get_close_matches(self.model, known, n=3, cutoff=0)
            raise UserError(
                f"extractor: torchvision has no classifier {self.model!r}; it has "
                f"{', '.join(near)} and others, by the names in torchvision.models"
            )
        if self.model.startswith("swin"):
            raise UserError(
                f"extractor: layers of {self.model} give (B, h, w, C), which is not read; take "
                "another model"
            )
        # The published weights of these two were trained on images in [-1, 1].
        own = {"transform_input": True} if self.model in ("googlenet", "inception_v3") else {}
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of initial weights, which are not used
            model: nn.Module = models.get_model(self.model, weights=None, **own).eval()
        return model

    def _maps(self, model: nn.Module) -> TorchvisionMaps:
        from torchvision import models
        from torchvision.models.feature_extraction import create_feature_extractor

        _check_layers(self.model, self.layers, [name for name, _ in model.named_modules() if name])
        network = create_feature_extractor(model, list(self.layers))
        usual = models.get_model_weights(self.model).DEFAULT.transforms()
        return TorchvisionMaps(network, self.side, usual.mean, usual.std)

    def _addresses(self) -> list[str]:
        """Where the published weights are, the newest first."""
        from torchvision import models

        every: Any = models.get_model_weights(self.model)
        newest, usual = every.DEFAULT, every.DEFAULT.transforms()
        # Weights of another normalisation (VGG16's of features alone) are not read.
        others = [
            each.url
            for each in every
            if each is not newest
            and (each.transforms().mean, each.transforms().std) == (usual.mean, usual.std)
        ]
        return [newest.url, *others]

    def _path(self) -> Path:
        if self.weights is not None:
            return Path(self.weights)
        file = self._addresses()[0].rpartition("/")[2]
        return Path(torch.hub.get_dir()) / "checkpoints" / file

    def _digests(self) -> list[str]:
        """What the sha256 may begin with."""
        if self.sha256 is not None:
            return [self.sha256]
        found = [re.search(r"-([0-9a-f]{8})\.pth$", address) for address in self._addresses()]
        return [match[1] for match in found if match]


class TorchvisionMaps(nn.Module):
    """Layers of a model.

    Args:
        network: from images to a mapping of outputs.
        side: to which images are resized, pixels; None: as they are.
        mean, std: of the images in [0, 1] that the model was trained on, a number for each colour.
    """

    def __init__(
        self, network: nn.Module, side: int | None, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.network = network
        self.side = side

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 1 or 3, H, W) to the layers' maps."""
        x = images.expand(-1, 3, -1, -1)
        if self.side is not None:
            x = functional.interpolate(
                x, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True
            )
        mean, std = (x.new_tensor(each).view(3, 1, 1) for each in (self.mean, self.std))
        return tuple(as_map(each) for each in self.network(((x + 1) / 2 - mean) / std).values())


def as_map(output: Tensor) -> Tensor:
    """A layer's output as a map (B, C, h, w): of (B, tokens, C) without a class token in front.

    Raises:
        UserError: neither a map nor tokens of a square image.
    """
    if output.dim() == 4:
        return output
    if output.dim() == 3:
        for front in (0, 1):
            side = math.isqrt(output.shape[1] - front)
            if side**2 == output.shape[1] - front:
                return output[:, front:].transpose(1, 2).unflatten(2, (side, side))
    raise UserError(
        f"extractor: a layer gives {tuple(output.shape)}, which is no map (B, C, h, w) and no "
        "tokens of a square image; take another layer"
    )


def _check_layers(model: str, layers: Sequence[str], known: Sequence[str]) -> None:
    """Refuse layers that a model does not have, or none."""
    unknown = [name for name in layers if name not in known]
    if unknown or not layers:
        few = ", ".join(known if len(known) <= 40 else known[:: len(known) // 20])
        raise UserError(
            f"extractor: {model} has no layer {unknown[0] if unknown else '(none given)'}; it has "
            f"{'' if len(known) <= 40 else 'such as '}{few}"
        )
