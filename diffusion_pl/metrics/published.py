"""Reference statistics as others publish them: the .npz files of ADM and of EDM.

    mu, sigma        mean (2048,) and covariance (2048, 2048) of Inception's pooled features
    mu_s, sigma_s    the same of the spatial ones, for sFID (ADM's files)

They say neither how many images they are of nor at what resolution, so neither can be checked; the
extractor is the published Inception, by agreement.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_pl.metrics.moments import Moments
from diffusion_pl.metrics.reference import Reference, load
from diffusion_pl.names import plain

# Means and covariances of 2,048 and 2,023 features in float64 are 64 MiB.
_LARGEST = 256 * 1024**2


def open_reference(path: Path) -> Reference:
    """Read statistics of either kind: ours (.safetensors), or a published .npz.

    Raises:
        ValueError: the file is absent, damaged or holds no statistics.
    """
    return load_npz(path) if path.suffix == ".npz" else load(path)


def load_npz(path: Path) -> Reference:
    """Read published statistics; nothing in the file is unpickled.

    Raises:
        ValueError: the file is absent, damaged or holds no statistics of Inception's features.
    """
    from diffusion_pl.metrics.inception import PUBLISHED, Inception  # torchvision: 2 s of CPU

    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _LARGEST:
            raise ValueError(f"unpacks to {unpacked:,} bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {
                key: torch.from_numpy(np.asarray(file[key], dtype=np.float64))
                for key in ("mu", "sigma", "mu_s", "sigma_s")
                if key in file.files
            }
    except Exception as error:
        # zipfile and numpy pass on whatever a damaged entry or header makes them raise.
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not published statistics ({reason})") from error
    pooled = _moments(path, arrays, "mu", "sigma", Inception.dimension)
    spatial = None
    if "mu_s" in arrays:
        spatial = _moments(path, arrays, "mu_s", "sigma_s", Inception.spatial)
    return Reference(
        name=plain(path.stem),
        fingerprint=hashlib.sha256(content).hexdigest(),
        resolution=0,
        count=0,
        extractor="inception",
        digest=PUBLISHED[:12],
        resize=Inception.resize,
        mean=pooled.mean,
        covariance=pooled.covariance,
        spatial=spatial,
    )


def _moments(
    path: Path, arrays: dict[str, Tensor], mean: str, covariance: str, dimension: int
) -> Moments:
    shapes = {mean: (dimension,), covariance: (dimension, dimension)}
    for key, shape in shapes.items():
        if key not in arrays:
            raise ValueError(f"{path}: not published statistics (no array {key!r})")
        if tuple(arrays[key].shape) != shape:
            raise ValueError(
                f"{path}: {key} must be {shape} (got {tuple(arrays[key].shape)}); these are not "
                "statistics of Inception's features"
            )
        if not torch.isfinite(arrays[key]).all():
            raise ValueError(f"{path}: {key} has values that are not finite")
    return Moments(arrays[mean], arrays[covariance], 0)
