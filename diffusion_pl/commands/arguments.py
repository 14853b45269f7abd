"""What the commands that measure take on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_features(part: argparse.ArgumentParser, default: str | None) -> None:
    """Which extractor looks."""
    said = f" ({default})" if default else " (the run's)"
    part.add_argument(
        "--features",
        default=default,
        metavar="NAME",
        help="inception, shapes, pixels, dinov2-vit-l-14, clip-vit-b-32, ... or auto" + said,
    )
    part.add_argument("--feature-weights", metavar="FILE", help="of Inception or CLIP")
    part.add_argument(
        "--feature-precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of Inception; the error of bf16 is measured and said (fp32)",
    )


def add_evaluate(part: argparse.ArgumentParser) -> None:
    """What measuring takes beside what drawing takes."""
    part.add_argument("--count", type=int, help="how many images (the experiment's; all of a file)")
    part.add_argument(
        "--blocks", type=int, default=1, help="disjoint blocks of images: mean, least, spread (1)"
    )
    part.add_argument(
        "--reference",
        metavar="DATA",
        help="compare with it: statistics (.safetensors, .npz), an experiment's data, images",
    )
    part.add_argument(
        "--metrics",
        type=lambda words: words.split(","),
        metavar="NAME,...",
        help="frechet, spatial, score, kernel, precision_recall, density_coverage, or all",
    )
    add_features(part, None)


def add_reference(part: argparse.ArgumentParser) -> None:
    """What statistics of real images take."""
    part.add_argument(
        "data", help="an experiment, a prepared folder, a folder or .zip of images, CIFAR-10"
    )
    part.add_argument("--resolution", type=int, help="side in pixels (the data's own)")
    part.add_argument(
        "--moments-only", action="store_true", help="a smaller file, enough for FID and sFID"
    )
    part.add_argument("--out", type=Path, help="write the file there too")
    part.add_argument("--device", default="auto", help="cpu, cuda or auto")
    add_features(part, "auto")
