"""Published reference statistics: .npz files of ADM, EDM, pytorch-fid and clean-fid.

    mu, sigma        mean (2048,) and covariance (2048, 2048) of Inception's pooled features
    mu_s, sigma_s    the same of the spatial ones, for sFID (ADM's files)
    arr_0            some of the images, uint8 (N, R, R, 3)

The moments do not state number and resolution of images; the images show the latter, and serve
metrics that compare single images. The extractor is the published Inception by convention. For a
file with images alone everything is computed.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.images import ImageDataset, Images
from diffusion_pl.io.files import sha256_of
from diffusion_pl.metrics import npz, real_images
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.moments import Moments
from diffusion_pl.metrics.reference import Reference, load
from diffusion_pl.names import plain

logger = logging.getLogger(__name__)

# In the names of clean-fid's files: how the images were resized.
_CLEAN = re.compile(r"_(clean|legacy_pytorch)_(?:\w+_)?(?:\d+|na)(?:_kid)?$")
_RESIZES = {
    "clean": "Pillow's bicubic, antialiased, to 299 px (clean-fid)",
    "legacy_pytorch": "torch's bilinear to 299 px (clean-fid's legacy_pytorch)",
}


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How images in a file are measured; arguments as for `real_images.cached`."""

    extractor: Extractor
    folder: Path
    keep: bool = False
    device: torch.device | str = "cpu"
    progress: Callable[[int, int], None] | None = None

    def of(self, images: ImageDataset) -> Reference:
        """The statistics of images, cached."""
        return real_images.cached(
            self.folder,
            images,
            self.extractor,
            keep=self.keep,
            device=self.device,
            progress=self.progress,
        )


def open_reference(path: Path, measuring: Measuring | None = None) -> Reference:
    """Read statistics: this package's (.safetensors), or a published .npz.

    Args:
        path: of the file.
        measuring: for images in an .npz; None: only its moments are read.

    Raises:
        UserError: absent, damaged or without statistics.
    """
    return load_npz(path, measuring) if path.suffix == ".npz" else load(path)


def only_images(path: Path) -> bool:
    """Whether a file is an .npz of images without moments."""
    try:
        return path.suffix == ".npz" and "mu" not in npz.entries(path)
    except Exception:  # `load_npz` reports it
        return False


def load_npz(path: Path, measuring: Measuring | None = None) -> Reference:
    """Read published statistics; nothing is unpickled, and only what is needed is read.

    Args:
        path: of the file.
        measuring: see `open_reference`.

    Raises:
        UserError: absent, damaged or without statistics of Inception's features.
    """
    from diffusion_pl.metrics.inception import PUBLISHED, Inception  # torchvision: 2 s of CPU

    try:
        found = npz.entries(path)
        digest = sha256_of(path)
    except Exception as error:
        raise _unfit(path, error) from error
    images = _images(path, found)
    if measuring is not None and images is not None:
        inception = measuring.extractor.digest == PUBLISHED[:12]
        if not inception and "mu" in found:
            logger.warning(
                "%s: its moments are of Inception's features; for %s its %s images are measured",
                path, measuring.extractor.name, f"{len(images):,}",
            )  # fmt: skip
        if not inception or "mu" not in found:
            return measuring.of(images)
    if "feats" in found:
        features = _array(path, found, "feats", (found["feats"].shape[0], Inception.dimension))
        pooled = Moments(features.mean(dim=0), features.T.cov(), len(features))
    else:
        features = None
        pooled = _moments(path, found, "mu", "sigma", Inception.dimension)
    spatial = None
    if "mu_s" in found:
        spatial = _moments(path, found, "mu_s", "sigma_s", Inception.spatial)
    if measuring is not None and measuring.keep and images is not None:
        features = measuring.of(images).features
    made = _CLEAN.search(path.stem)
    return Reference(
        name=plain(path.stem),
        fingerprint=digest,
        resolution=0 if images is None else images.resolution,
        count=pooled.count,
        extractor="inception",
        digest=PUBLISHED[:12],
        resize=Inception.resize if made is None else _RESIZES[made[1]],
        mean=pooled.mean,
        covariance=pooled.covariance,
        spatial=spatial,
        features=None if features is None else features.float(),
    )


def _images(path: Path, found: Mapping[str, npz.Entry]) -> Images | None:
    """The images of a file, or None."""
    entry = next((found[name] for name in npz.IMAGES if name in found), None)
    if entry is None or ("mu" in found and npz.unfit(entry) is not None):
        return None
    return npz.arrays(path)


def _unfit(path: Path, error: object) -> ValueError:
    return UserError(f"{path}: not published statistics ({' '.join(str(error).split())})")


def _array(path: Path, found: Mapping[str, npz.Entry], key: str, shape: tuple[int, ...]) -> Tensor:
    """One array in float64; its shape is checked before it is read."""
    if key not in found:
        raise _unfit(path, f"no array {key!r}")
    entry = found[key]
    if not (np.issubdtype(entry.dtype, np.floating) or np.issubdtype(entry.dtype, np.integer)):
        raise _unfit(path, f"{key} is of {entry.dtype}")
    if entry.shape != shape:
        raise UserError(
            f"{path}: {key} must be {shape} (got {entry.shape}); these are not statistics of "
            "Inception's features"
        )
    try:
        values = torch.from_numpy(npz.numbers(path, entry).astype(np.float64))
    except Exception as error:
        raise _unfit(path, error) from error
    if not torch.isfinite(values).all():
        raise UserError(f"{path}: {key} has values that are not finite")
    return values


def _moments(
    path: Path, found: Mapping[str, npz.Entry], mean: str, covariance: str, dimension: int
) -> Moments:
    return Moments(
        _array(path, found, mean, (dimension,)),
        _array(path, found, covariance, (dimension, dimension)),
        0,
    )
