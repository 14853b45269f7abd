"""`evaluate`: measure a run, a checkpoint, or image files; prints one JSON object."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffusion_pl import config
from diffusion_pl.commands import data_sets, hints, parts, runs, trust
from diffusion_pl.commands.metric_choice import MetricChoice
from diffusion_pl.commands.options import (
    FeatureOptions,
    Integer,
    MetricOptions,
    RunOptions,
    SamplerOptions,
)
from diffusion_pl.commands.results import Result
from diffusion_pl.data.files import IMAGES, SAMPLE, read_sample
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation, reference_of
from diffusion_pl.evaluation.blocks import evaluate_blocks
from diffusion_pl.evaluation.image_files import ImageFiles
from diffusion_pl.evaluation.measuring import GeneratedImages, check_captions
from diffusion_pl.evaluation.provenance import described, surroundings
from diffusion_pl.interop import statistics
from diffusion_pl.metrics import extractors
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.fid import Frechet
from diffusion_pl.metrics.npz import arrays
from diffusion_pl.metrics.real_images import KEPT
from diffusion_pl.metrics.reference import Reference
from diffusion_pl.names import shown
from diffusion_pl.progress import counted, format_row
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History

ROWS = "evaluations.jsonl"


def command(
    run: Path,
    /,
    *,
    blocks: Integer = 1,
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
    wanted: MetricOptions = MetricOptions(),
    features: FeatureOptions = FeatureOptions(),
) -> Result:
    """Evaluate a run, or images in a folder or .npz; records what every number depends on.

    Example: diffusion_pl evaluate runs/mine --count 10000 --metrics frechet,kernel

    Args:
        run: a run's folder, a checkpoint file, or images.
        blocks: number of disjoint blocks of images; gives mean, minimum and range.
    """
    opened = runs.open_run(run, sampling, options) if runs.is_run(run) else None
    if opened is None:
        refuse_sampling_options(run, sampling, options)
    result = measured(run if opened is None else opened, blocks, options, wanted, features)
    rows = result["measures"]
    if rows:
        print_table(rows)
    after = [hints.next_line("export", run, hints.beside(run))] if opened is not None else []
    return Result(result, [], [*after, *summary_lines(run, rows, result)], indent=2)


def measured(
    what: runs.OpenedRun | Path,
    blocks: int,
    options: RunOptions,
    wanted: MetricOptions,
    features: FeatureOptions,
) -> dict[str, Any]:
    """Evaluate a run, keeping the rows in its folder, or image files.

    Args:
        what: the run, or the path of images.
        blocks: number of disjoint blocks of images.
        options: of the run.
        wanted: metrics and reference.
        features: the extractor.

    Returns:
        The result of the command; "measures" are the rows.

    Raises:
        UserError: settings that do not fit what is measured.
    """
    choice = MetricChoice(wanted, options)
    if blocks < 1:
        raise UserError(f"--blocks: must be at least 1 (got {blocks})")
    log: EvaluationLog | None = None
    if isinstance(what, runs.OpenedRun):
        about = {
            "run": str(what.folder),
            "checkpoint": str(what.model.checkpoint),
            "images": what.model.images,
            "weights": what.generator.origin["weights"],
        }
        images: GeneratedImages = what.generator
        extractor = extractor_of(features, what.model.config)
        settings = choice.settings(config.build(what.model.config, "evaluation"))
        reference = reference_for(what.model.config, images, settings, extractor, choice)
        log = EvaluationLog(what, settings, extractor, reference)
    else:
        images = files = open_files(what, options.device)
        about = {"source": files.source}
        origin = sampled_run(files.drawn, options.allow) if wanted.reference is None else None
        if wanted.reference is None and origin is None:
            raise UserError(f"{what}: name what to compare the images with: --reference DATA")
        extractor = extractor_of(features, origin)
        count = max(1, len(files.real) // blocks)
        settings = choice.settings(settings_for_files(origin, count))
        if (total := settings.count * blocks) > len(files.real):
            raise UserError(f"{what}: has {len(files.real):,} images (need {total:,})")
        reference = reference_for(origin, images, settings, extractor, choice)
    reference.check(extractor, images.shape[1])
    settings = choice.feasible(settings, lambda m: check_captions(m, images))
    settings = choice.feasible(settings, lambda m: m.build(extractor, reference, settings.count))
    with counted("evaluation") as progress:
        rows, _ = evaluate_blocks(
            images,
            settings,
            extractor,
            reference,
            blocks=blocks,
            progress=progress,
            known=log.block if log else None,
            keep=log.add_block if log else print_block,
        )
    result = {**about, "measures": rows}
    if choice.left_out:
        result["left_out"] = choice.left_out
    if log and rows:
        result["rows"] = log.add(rows)
    return result


def settings_for_files(origin: config.Config | None, count: int) -> Evaluation:
    """The evaluation of image files: that of the run they come from, else the Frechet distance."""
    default = Evaluation(every=1, count=count, metrics=[Frechet()])
    if origin is None:
        return default
    own: Evaluation = config.build(origin, "evaluation")
    return dataclasses.replace(own, count=count, metrics=own.metrics or default.metrics)


class EvaluationLog:
    """The rows of a run's evaluations, in its folder: of each finished block, then of all.

    A block with the same settings, code and hardware is not evaluated again.

    Args:
        opened: the run.
        settings: of this evaluation.
        extractor: of the features.
        reference: of the real images.
    """

    def __init__(
        self,
        opened: runs.OpenedRun,
        settings: Evaluation,
        extractor: Extractor,
        reference: Reference,
    ) -> None:
        self.history = History(opened.folder / ROWS)
        self.images = opened.model.images
        about = {
            key: value for key, value in opened.generator.about().items() if key != "checkpoint"
        }
        self.depends = {
            **about,
            "digest": checkpoints.digest(opened.model.checkpoint),
            "count": settings.count,
            "metrics": [described(metric) for metric in settings.metrics],
            "extractor": f"{extractor.name}-{extractor.digest}-{extractor.precision}",
            "reference": [reference.fingerprint, reference.resolution, reference.count],
            **surroundings(opened.generator.device),
        }

    def block(self, number: int) -> list[dict[str, Any]]:
        """The rows of a block that was evaluated before; [] for none."""
        key = self._key(number)
        rows = [row for row in self.history.rows() if row.get("block") == key]
        return [{k: v for k, v in row.items() if k not in ("block", "images")} for row in rows]

    def add_block(self, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of a finished block."""
        self._write({"images": self.images, **row, "block": self._key(number)} for row in rows)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Write the rows of the evaluation; returns their file, None where it cannot be written."""
        return self._write({"images": self.images, **row} for row in rows)

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> str | None:
        try:
            self.history.append(*rows)
        # Another user's run, or a full disk: the numbers are printed all the same.
        except (OSError, ValueError) as error:
            print(shown(f"{self.history.path}: not kept ({error})"), file=sys.stderr)
            return None
        return str(self.history.path)

    def _key(self, number: int) -> str:
        parts = {**self.depends, "block": number}
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def print_block(number: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the numbers of a finished block of image files."""
    print(shown(f"block {number}: {'; '.join(map(format_row, rows))}"), file=sys.stderr)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the numbers as a table on stderr."""
    first = rows[0]
    lines = Table(title=Text(shown(first["name"].partition("@")[2])), box=box.SIMPLE_HEAD)
    lines.add_column("number")
    lines.add_column("value", justify="right")
    several = "blocks" in first
    for column in ("min", "range") if several else ():
        lines.add_column(column, justify="right")
    for row in rows:
        more = [f"{row['min']:.4g}", f"{row['range']:.2g}"] if several else []
        lines.add_row(Text(shown(row["name"].partition("@")[0])), f"{row['value']:.4g}", *more)
    Console(stderr=True).print(lines)


def summary_lines(
    target: Path, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> list[str]:
    """The last lines: every number, what they are of, and where they are kept."""
    if not rows:
        return [f"{target}: its evaluation has no metrics; name some: --metrics NAME"]
    first = rows[0]
    model = [str(first[key]) for key in ("weights", "sampler") if first.get(key)]
    words = ", ".join([*model, f"{first['n']:,} images"])
    of = f"{result.get('checkpoint', target)}  {words}"
    where = f"kept     {result.get('rows') or 'only on stdout: --json prints all of it'}"
    return [*(f"measured {format_row(row)}" for row in rows), f"of       {of}", where]


def extractor_of(options: FeatureOptions, experiment: config.Config | None) -> Extractor:
    """The extractor of the options, else the experiment's, else the best one available."""
    if options.features is not None or experiment is None:
        name = options.features or "auto"
        return extractors.load(name, options.feature_weights, options.feature_precision)
    return trust.extractor_of(experiment)


def reference_for(
    experiment: config.Config | None,
    images: GeneratedImages,
    settings: Evaluation,
    extractor: Extractor,
    choice: MetricChoice,
) -> Reference:
    """The reference: that of the options, else the evaluation's file, else the training data.

    Args:
        experiment: of the run that the images come from; None: the options name a reference.
        images: to be evaluated.
        settings: of the evaluation.
        extractor: of the features.
        choice: of the command line.
    """
    if choice.wanted.reference is not None or experiment is None:
        return data_sets.reference_of(
            str(choice.wanted.reference),
            extractor,
            resolution=images.shape[1],
            keep=settings.wants_features,
            device=str(images.device),
            resize=choice.wanted.resize,
        )
    data = runs.images_of(experiment)
    if settings.reference is None:
        real = min(len(data), KEPT)
        settings = choice.feasible(settings, lambda m: m.check_count(settings.count, real))
    with counted("reference") as progress:
        return reference_of(
            data,
            settings,
            extractor,
            parts.REFERENCES,
            images.device,
            progress,
            open_file=statistics.open_any,
        )


def refuse_sampling_options(run: Path, sampling: SamplerOptions, options: RunOptions) -> None:
    """Refuse options of sampling where existing images are evaluated.

    Raises:
        UserError: names the option.
    """
    given = vars(sampling) | vars(options)
    for name in ("sampler", "steps", "guidance", "guidance_interval", "guide", "set"):
        if given[name] not in (None, ()):
            raise UserError(
                f"--{name.replace('_', '-')}: is for sampling from a run, and {run} holds images; "
                "leave it out"
            )


def open_files(path: Path, device: str) -> ImageFiles:
    """Images in a folder, a .zip or an .npz.

    Raises:
        UserError: there are none, or they are broken or of different sizes.
    """
    device = runs.resolve_device(device)
    if not path.exists():
        raise UserError(f"{path}: there is no such run, nor images; runs lie under {parts.RUNS}/")
    drawn = sampling_record(path)
    images = arrays(path) if path.suffix == ".npz" else data_sets.images_of(str(path))
    return ImageFiles(images, str(path), torch.device(device), drawn)


def sampled_run(drawn: Mapping[str, Any] | None, allow: Sequence[str]) -> config.Config | None:
    """The config of the run that images were sampled from; None where there is none here."""
    named = None if drawn is None else drawn.get("run")
    if type(named) is not str or not runs.is_run(Path(named)):
        return None
    print(shown(f"evaluated as their run {named}: its data and metrics"), file=sys.stderr)
    return runs.config_of(Path(named), allow)


def sampling_record(path: Path) -> dict[str, Any] | None:
    """What `sample` recorded of images, given its folder, its folder of images or its .npz.

    Raises:
        UserError: the images are not complete.
    """
    ours = path.name in (IMAGES, "images.npz") and (path.parent / SAMPLE).is_file()
    folder = path.parent if ours else path
    said = None
    with contextlib.suppress(ValueError):  # somebody else's file of that name
        said = read_sample(folder) if (folder / IMAGES).is_dir() else None
    if said is not None and not said.get("complete"):
        raise UserError(
            f"{folder}: not all of its images are sampled; run the same `sample` command again"
        )
    if said is not None and said.get("files") == "tar":
        raise UserError(
            f"{folder}: holds its images as tars; prepare them first: python -m diffusion_pl "
            f"prepare {folder / IMAGES} DEST"
        )
    about = ("run", "checkpoint", "first", "count", "settings")
    return None if said is None else {key: said.get(key) for key in about}
