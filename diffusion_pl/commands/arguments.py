"""What the commands that measure, launch or look after files take on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
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


def add_check(part: argparse.ArgumentParser) -> None:
    """What is printed of an experiment."""
    part.add_argument(
        "--resolved", action="store_true", help="print the resolved YAML, all defaults merged"
    )


def add_upkeep(verify: argparse.ArgumentParser, convert: argparse.ArgumentParser) -> None:
    """What the commands that look after files take."""
    verify.add_argument("path", type=Path, help="prepared data, a run's folder, or a checkpoint")
    convert.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint")


def add_evaluate(part: argparse.ArgumentParser) -> None:
    """What measuring takes beside what drawing takes."""
    part.add_argument(
        "--blocks", type=int, default=1, help="disjoint blocks of images: mean, least, spread (1)"
    )
    _add_measures(part)


def add_launch(part: argparse.ArgumentParser) -> None:
    """What a job for SLURM takes beside what training takes."""
    part.add_argument("--run", type=Path, help="the run's folder (runs/EXPERIMENT)")
    part.add_argument("--nodes", type=int, default=1, help="machines (1)")
    part.add_argument("--gpus", type=int, default=1, help="GPUs of a machine, a process each (1)")
    part.add_argument("--tasks", type=int, help="processes of a machine, without GPUs")
    part.add_argument("--cpus", type=int, help="cores of a process (one, and one a data worker)")
    part.add_argument("--time", default="24:00:00", help="limit of one stretch (24:00:00)")
    part.add_argument(
        "--margin", type=int, metavar="SECONDS", help="before it for stopping (three saves)"
    )
    part.add_argument("--container", metavar="IMAGE", help="run in it, by apptainer")
    part.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=V,V", help="a run for each: an array"
    )
    part.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="as --sbatch=--partition=gpu",
    )
    part.add_argument(
        "--data-changed", action="store_true", help="go on with other data than until now"
    )
    part.add_argument("--dry-run", action="store_true", help="write the script, do not submit it")
    part.add_argument("--inside", action="store_true", help="the check that the script begins with")


def _add_measures(part: argparse.ArgumentParser) -> None:
    """What is measured, and against what."""
    part.add_argument("--count", type=int, help="how many images (the experiment's; all of a file)")
    part.add_argument(
        "--reference",
        metavar="DATA",
        help="compare with it: statistics (.safetensors, .npz), an experiment's data, images",
    )
    part.add_argument(
        "--resize", action="store_true", help="enlarge a reference's smaller pictures"
    )
    part.add_argument(
        "--subset-size",
        type=int,
        metavar="N",
        help="images of a subset of the kernel distance (1000, or half of the smaller set)",
    )
    part.add_argument(
        "--metrics",
        type=_words,
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


def add_losses(part: argparse.ArgumentParser) -> None:
    """What the errors by level take beside what drawing takes."""
    part.add_argument("--data", help="other images than the run's, such as a test set")
    part.add_argument("--count", type=int, default=256, help="images (256)")
    part.add_argument("--levels", type=int, default=20, help="noise levels, even in log sigma (20)")
    part.add_argument("--out", type=Path, help="folder of the plot (RUN/losses)")


def add_sweep(part: argparse.ArgumentParser) -> None:
    """What a sweep takes: lists where `evaluate` takes one value."""
    part.add_argument("--samplers", type=_words, metavar="NAME,...", help="the run's own otherwise")
    part.add_argument(
        "--steps", type=_numbers(int), dest="steps_list", metavar="N,...", help="of the samplers"
    )
    part.add_argument(
        "--guidance",
        type=_numbers(float),
        dest="guidance_list",
        metavar="WEIGHT,...",
        help="weights of the guidance",
    )
    part.add_argument(
        "--weights",
        type=lambda text: [weights(word) for word in _words(text)],
        dest="weights_kinds",
        default=["ema"],
        metavar="KIND,...",
        help="ema, denoiser (raw), ema:0.05 (an average of that length), ... (ema)",
    )
    part.add_argument(
        "--checkpoints", action="store_true", help="every checkpoint of the run, not the newest"
    )
    part.add_argument("--out", type=Path, help="folder of the table (RUN/sweep)")
    _add_measures(part)


def weights(text: str) -> str:
    """Which weights: "ema", "denoiser", or "ema:LENGTH" with a number."""
    kind, _, length = text.partition(":")
    if kind not in ("ema", "denoiser") or (length and kind != "ema"):
        raise argparse.ArgumentTypeError(f"ema, denoiser or ema:LENGTH (got {text!r})")
    if length:
        try:
            float(length)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"a length is a number (got {length!r})") from error
    return text


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(kind: type) -> Callable[[str], list[float]]:
    def read(text: str) -> list[float]:
        return [kind(word) for word in _words(text)]

    read.__name__ = "numbers"  # what argparse calls it in a complaint
    return read
