"""`evaluate`: the measurements of training, on demand; prints one JSON object."""

from __future__ import annotations

import argparse
import dataclasses
import json

from rich.console import Console
from rich.progress import Progress

from diffusion_pl import config
from diffusion_pl.commands import parts, runs
from diffusion_pl.data.source import Source
from diffusion_pl.evaluation import Evaluation, evaluate, reference_of
from diffusion_pl.metrics.features import Extractor

FAILURES: tuple[type[Exception], ...] = ()


def run(options: argparse.Namespace) -> int:
    """Measure the run's newest checkpoint, or the one that is named."""
    opened = runs.open_run(options)
    drawing = opened.drawing
    settings: Evaluation = config.build(opened.model.config, "evaluation")
    settings = dataclasses.replace(
        settings,
        count=settings.count if options.count is None else options.count,
        batch_size=options.batch_size or settings.batch_size,
        seed=options.seed,
    )
    extractor: Extractor = config.build(opened.model.config, "features")
    source: Source = config.build(opened.model.config, "data")
    source.prepare()
    device = next(drawing.denoiser.parameters()).device
    reference = reference_of(source.open(), extractor, parts.REFERENCES, device)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("evaluation", total=settings.count)
        rows, _ = evaluate(
            drawing,
            settings,
            extractor,
            reference,
            progress=lambda done, total: bar.update(task, completed=done),
        )
    result = {
        "run": str(opened.folder),
        "checkpoint": str(opened.model.checkpoint),
        "images": opened.model.images,
        "weights": options.weights,
        "measures": rows,
    }
    print(json.dumps(result, indent=2))
    return 0
