"""`evaluate`: measure a run, a checkpoint, or images in files; prints one JSON object."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from diffusion_pl import config
from diffusion_pl.commands import data_sets, parts, runs, trust
from diffusion_pl.evaluation import Evaluation, reference_of
from diffusion_pl.evaluation.blocks import evaluate_blocks
from diffusion_pl.evaluation.given import Given, arrays
from diffusion_pl.evaluation.measuring import Drawn, Progress
from diffusion_pl.evaluation.settings import MetricSettings
from diffusion_pl.metrics import features
from diffusion_pl.metrics.density_coverage import DensityCoverage
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.frechet import Frechet
from diffusion_pl.metrics.inception_score import InceptionScore
from diffusion_pl.metrics.kernel import Kernel
from diffusion_pl.metrics.precision_recall import PrecisionRecall
from diffusion_pl.metrics.reference import Reference
from diffusion_pl.names import shown
from diffusion_pl.training.progress import in_words

FAILURES: tuple[type[Exception], ...] = ()

METRICS: Mapping[str, MetricSettings] = {
    "frechet": Frechet(),
    "spatial": Frechet(of="spatial"),
    "score": InceptionScore(),
    "kernel": Kernel(),
    "precision_recall": PrecisionRecall(),
    "density_coverage": DensityCoverage(),
}


def run(options: argparse.Namespace) -> int:
    """Measure what is named, and say every number with all that it depends on."""
    target: Path = options.run
    if runs.is_run(target):
        opened = runs.open_run(options)
        about = {
            "run": str(opened.folder),
            "checkpoint": str(opened.model.checkpoint),
            "images": opened.model.images,
            "weights": options.weights,
        }
        extractor = extractor_of(options, opened.model.config)
        own: Evaluation = config.build(opened.model.config, "evaluation")
        settings = settings_of(options, own, extractor)
        drawn: Drawn = opened.drawing
        reference = run_reference(options, opened, settings, extractor)
    else:
        given = open_given(target, options.device)
        drawn, about = given, {"source": given.source}
        extractor = extractor_of(options, None)
        everything = Evaluation(every=1, count=len(given.real), metrics=[Frechet()])
        settings = settings_of(options, everything, extractor)
        if options.reference is None:
            raise ValueError(f"{target}: images are compared with something: --reference DATA")
        reference = named_reference(options.reference, drawn, settings, extractor)
    with progress_bar("evaluation") as progress:
        rows, _ = evaluate_blocks(
            drawn, settings, extractor, reference, blocks=options.blocks, progress=progress
        )
    for row in rows:
        print(shown(in_words(row)), file=sys.stderr)
    print(json.dumps({**about, "measures": rows}, indent=2))
    return 0


def settings_of(
    options: argparse.Namespace, settings: Evaluation, extractor: Extractor
) -> Evaluation:
    """The experiment's evaluation, and over it what the command line says.

    Raises:
        ValueError: a metric that is not known.
    """
    metrics = settings.metrics
    count = settings.count if options.count is None else options.count
    # The kernel distance is unbiased in any size of its subsets.
    known = {**METRICS, "kernel": Kernel(size=min(count, Kernel.size))}
    if options.metrics:
        unknown = set(options.metrics) - set(METRICS) - {"all"}
        if unknown:
            raise ValueError(
                f"--metrics: there is no {', '.join(sorted(unknown))}; "
                f"choose of {', '.join(METRICS)} or all"
            )
        metrics = [known[name] for name in options.metrics if name != "all"]
        if "all" in options.metrics:
            lacking = {"spatial": extractor.spatial == 0, "score": extractor.classes == 0}
            metrics = [known[name] for name in known if not lacking.get(name)]
    return dataclasses.replace(
        settings,
        count=count,
        batch_size=options.batch_size or settings.batch_size,
        seed=options.seed,
        metrics=metrics,
    )


def extractor_of(options: argparse.Namespace, experiment: config.Config | None) -> Extractor:
    """The extractor that the command line names, else the experiment's, else what there is."""
    if options.features is not None or experiment is None:
        name = options.features or "auto"
        return features.load(name, options.feature_weights, options.feature_precision)
    return trust.extractor_of(experiment)


def run_reference(
    options: argparse.Namespace, opened: runs.Opened, settings: Evaluation, extractor: Extractor
) -> Reference:
    """What a run is compared with: what is named, else its evaluation's file, else its data."""
    if options.reference is not None:
        return named_reference(options.reference, opened.drawing, settings, extractor)
    source = trust.data_of(opened.model.config)
    source.prepare()
    with progress_bar("reference") as progress:
        return reference_of(
            source.open(), settings, extractor, parts.REFERENCES, opened.drawing.device, progress
        )


def named_reference(
    named: str, drawn: Drawn, settings: Evaluation, extractor: Extractor
) -> Reference:
    """A file of statistics, or a data set, by its word on the command line."""
    return data_sets.reference_of(
        named,
        extractor,
        resolution=drawn.shape[1],
        keep=settings.wants_features,
        device=str(drawn.device),
    )


def open_given(path: Path, device: str) -> Given:
    """Images in a folder, a .zip or an .npz, in the place of drawn ones.

    Raises:
        ValueError: nothing there, or images that are broken or of different sizes.
    """
    device = runs.device_named(device)
    if not path.exists():
        raise ValueError(f"{path}: there is no such run, nor images; runs lie under {parts.RUNS}/")
    if path.suffix == ".npz":
        found = arrays(path)
        return Given(found, found.array.shape[3], str(path), torch.device(device))
    images = data_sets.images_of(str(path))
    return Given(images, images.channels, str(path), torch.device(device))


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar on stderr with the time that is left."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    console = Console(stderr=True)
    options: dict[str, Any] = {"console": console, "disable": not console.is_terminal}
    bar = Bar(*columns, TimeRemainingColumn(), transient=True, **options)
    with bar:
        task: Any = bar.add_task(shown(what), total=None, text="")

        def progress(done: int, total: int) -> None:
            bar.update(task, total=total, completed=done, text=f"{done:,}/{total:,} images")

        yield progress
