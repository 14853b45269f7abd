"""`reference`: compute the statistics of real images; prints one JSON object."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffusion_pl.commands import data_sets, evaluate, parts, runs
from diffusion_pl.commands.options import (
    FeatureOptions,
    Integer,
)
from diffusion_pl.commands.results import Result
from diffusion_pl.metrics import real_images
from diffusion_pl.progress import counted


def command(
    data: str,
    /,
    *,
    resolution: Integer | None = None,
    moments_only: bool = False,
    out: Path | None = None,
    device: str = "auto",
    features: FeatureOptions = FeatureOptions(),
) -> Result:
    """Compute the statistics of real images, to compare with.

    Example: diffusion_pl reference data/cifar-10-python.tar.gz --features inception

    Args:
        data: an experiment, a prepared folder, a folder or .zip of images, CIFAR-10.
        resolution: side in pixels; the data's own when not given.
        moments_only: a smaller file, enough for FID and sFID.
        out: copy the file there.
        device: cpu, cuda or auto.
    """
    extractor = evaluate.extractor_of(features, None)
    images = data_sets.images_of(data, resolution)
    keep = not moments_only
    with counted("reference") as progress:
        found = real_images.cached(
            parts.REFERENCES,
            images,
            extractor,
            keep=keep,
            device=runs.resolve_device(device),
            progress=progress,
        )
    path = real_images.path_of(parts.REFERENCES, images, extractor, keep=keep)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out)
        path = out
    about = {
        "file": str(path),
        "name": found.name,
        "images": found.count,
        "resolution": found.resolution,
        "fingerprint": found.fingerprint,
        "extractor": f"{found.extractor}-{found.digest}",
        "resize": found.resize,
        "features": found.precision,
        "single_images": 0 if found.features is None else len(found.features),
    }
    return Result(about, indent=2)
