"""Reference statistics in pickles, as EDM2 publishes them, read without running anything in them.

    {"fid": {"mu": (2048,), "sigma": (2048, 2048)}, "fd_dinov2": {"mu": (1024,), ...}}

EDM2 shows images to DINOv2 at 224 px by torch's antialiased bicubic, and torch-fidelity's extractor
by TensorFlow's bilinear, so that its fd_dinov2 is not compared with ours; its fid is.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.interop import pickles
from diffusion_pl.io.files import sha256_of
from diffusion_pl.metrics import published
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.reference import Reference
from diffusion_pl.names import plain

# What EDM2 calls a distance, and the extractor it is taken over.
KINDS = {"inception": "fid", "dinov2-vit-l-14": "fd_dinov2"}

DTYPES = {"f": torch.float32, "d": torch.float64}

# Means and covariances of 2,048 and 1,024 features in float64 are 40 MiB.
LARGEST = 128 * 1024**2


def open_any(path: Path, measuring: published.Measuring) -> Reference:
    """Read statistics of any kind: a pickle of EDM2's, or what `published` reads.

    Args:
        path: the file.
        measuring: the extractor, and what images in an .npz are measured with.

    Raises:
        UserError: the file is absent, damaged or holds no statistics.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file of reference statistics")
    if path.suffix == ".pkl":
        return open_reference(path, measuring.extractor)
    return published.open_reference(path, measuring)


def open_reference(path: Path, extractor: Extractor) -> Reference:
    """Read the statistics of one extractor.

    Raises:
        UserError: the file is absent, damaged, no such statistics, or without this extractor's.
    """
    from diffusion_pl.metrics.inception import PUBLISHED, Inception  # torchvision: 2 s of CPU

    size = path.stat().st_size
    if size > LARGEST:
        raise UserError(f"{path}: is no file of statistics ({size:,} bytes)")
    content = pickles.read_pickle(path)
    known = sorted(map(str, content)) if isinstance(content, dict) else []
    if not isinstance(content, dict) or not set(known) & set(KINDS.values()):
        raise UserError(f"{path}: holds no statistics of EDM2's layout (got {known[:8]})")
    kind = KINDS.get(extractor.name)
    if kind not in content:
        raise UserError(
            f"{path}: has statistics for {', '.join(known)}, none for the extractor "
            f"{extractor.name}; choose another: --features"
        )
    inception = kind == "fid"
    wide = Inception.dimension if inception else extractor.dimension
    return Reference(
        name=plain(path.stem),
        fingerprint=sha256_of(path),
        resolution=0,
        count=0,
        extractor=extractor.name,
        digest=PUBLISHED[:12] if inception else extractor.digest,
        resize=Inception.resize if inception else "torch's antialiased bicubic to 224 px (EDM2)",
        mean=_array(path, content[kind], "mu", (wide,)),
        covariance=_array(path, content[kind], "sigma", (wide, wide)),
    )


def _array(path: Path, held: Any, key: str, shape: tuple[int, ...]) -> Tensor:
    found = held.get(key) if isinstance(held, dict) else None
    sides, data = getattr(found, "shape", None), getattr(found, "data", b"")
    code = getattr(found, "code", "")
    if sides != shape or code not in ("f", "d"):
        raise UserError(f"{path}: {key} must be {shape} of floats (got {sides})")
    if len(data) != math.prod(shape) * struct.calcsize(code):
        raise UserError(f"{path}: {key} has {len(data):,} bytes for {shape}")
    values = torch.frombuffer(bytearray(data), dtype=DTYPES[code]).double().reshape(shape)
    if not torch.isfinite(values).all():
        raise UserError(f"{path}: {key} has values that are not finite")
    return values
