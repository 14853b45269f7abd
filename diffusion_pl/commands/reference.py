"""`reference`: statistics of real images, to compare with; prints one JSON object."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from diffusion_pl.commands import data_sets, evaluate, parts, runs
from diffusion_pl.metrics import features, real_images

FAILURES: tuple[type[Exception], ...] = ()


def run(options: argparse.Namespace) -> int:
    """Measure a data set once, and say where its statistics lie."""
    extractor = features.load(options.features, options.feature_weights, options.feature_precision)
    images = data_sets.images_of(options.data, options.resolution)
    device = runs.device_named(options.device)
    keep = not options.moments_only
    with evaluate.progress_bar("reference") as progress:
        found = real_images.cached(
            parts.REFERENCES, images, extractor, keep=keep, device=device, progress=progress
        )
    path = real_images.path_of(parts.REFERENCES, images, extractor, keep=keep)
    if options.out is not None:
        out: Path = options.out
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out)
        path = out
    print(
        json.dumps(
            {
                "file": str(path),
                "name": found.name,
                "images": found.count,
                "resolution": found.resolution,
                "fingerprint": found.fingerprint,
                "extractor": f"{found.extractor}-{found.digest}",
                "resize": found.resize,
                "features": found.precision,
                "single_images": 0 if found.features is None else len(found.features),
            },
            indent=2,
        )
    )
    return 0
