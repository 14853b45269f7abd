"""`evaluate`: measure a run, a checkpoint, or images in files; prints one JSON object."""

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
from diffusion_pl.commands.options import FeatureOptions, MetricOptions, RunOptions, SamplerOptions
from diffusion_pl.commands.results import Result
from diffusion_pl.data.files import PICTURES, SAMPLE, read_sample
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation, reference_of
from diffusion_pl.evaluation.blocks import evaluate_blocks
from diffusion_pl.evaluation.image_files import ImageFiles
from diffusion_pl.evaluation.measuring import GeneratedImages
from diffusion_pl.evaluation.provenance import described, surroundings
from diffusion_pl.interop import statistics
from diffusion_pl.metrics import extractors
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.frechet import Frechet
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
    blocks: int = 1,
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
    wanted: MetricOptions = MetricOptions(),
    features: FeatureOptions = FeatureOptions(),
) -> Result:
    """Measure a run, or images in a folder or .npz: every number with all that it depends on.

    Example: diffusion_pl evaluate runs/mine --count 10000 --metrics frechet,kernel

    Args:
        run: a run's folder, a checkpoint file, or images.
        blocks: disjoint blocks of images: mean, least, spread.
    """
    opened = runs.open_run(run, sampling, options) if runs.is_run(run) else None
    if opened is None:
        refuse_drawing(run, sampling, options)
    result = measured(run if opened is None else opened, blocks, options, wanted, features)
    rows = result["measures"]
    if rows:
        table(rows)
    after = [hints.next_line("export", run, hints.beside(run))] if opened is not None else []
    # The lines for people are the last.
    return Result(result, [], [*after, *what_matters(run, rows, result)], indent=2)


def measured(
    what: runs.OpenedRun | Path,
    blocks: int,
    options: RunOptions,
    wanted: MetricOptions,
    features: FeatureOptions,
) -> dict[str, Any]:
    """Measure a run, and keep the rows in its folder; or images that are there.

    Args:
        what: the run, or where images lie.
        blocks: disjoint blocks of images.
        options: of the run.
        wanted: what is measured, and against what.
        features: the extractor.

    Returns:
        What was measured; "measures" are the rows.

    Raises:
        UserError: settings that do not fit what is measured.
    """
    choice = MetricChoice(wanted, options)
    if blocks < 1:
        raise UserError(f"--blocks: must be at least 1 (got {blocks})")
    kept: Kept | None = None
    if isinstance(what, runs.OpenedRun):
        about = {
            "run": str(what.folder),
            "checkpoint": str(what.model.checkpoint),
            "images": what.model.images,
            "weights": what.generator.origin["weights"],
        }
        drawn: GeneratedImages = what.generator
        extractor = extractor_of(features, what.model.config)
        settings = choice.settings(config.build(what.model.config, "evaluation"))
        reference = reference_for(what.model.config, drawn, settings, extractor, choice)
        kept = Kept(what, settings, extractor, reference)
    else:
        given = open_given(what, options.device)
        drawn, about = given, {"source": given.source}
        origin = drawn_by(given.drawn, options.allow) if wanted.reference is None else None
        if wanted.reference is None and origin is None:
            raise UserError(f"{what}: images are compared with something: --reference DATA")
        extractor = extractor_of(features, origin)
        count = max(1, len(given.real) // blocks)
        settings = choice.settings(of_images(origin, count))
        if (several := settings.count * blocks) > len(given.real):
            raise UserError(f"{what}: has {len(given.real):,} images, {several:,} are asked for")
        reference = reference_for(origin, drawn, settings, extractor, choice)
    reference.check(extractor, drawn.shape[1])
    settings = choice.feasible(settings, lambda m: m.build(extractor, reference, settings.count))
    with counted("evaluation") as progress:
        rows, _ = evaluate_blocks(
            drawn,
            settings,
            extractor,
            reference,
            blocks=blocks,
            progress=progress,
            known=kept.block if kept else None,
            keep=kept.keep_block if kept else show_block,
        )
    result = {**about, "measures": rows}
    if choice.left_out:
        result["left_out"] = choice.left_out
    if kept and rows:
        result["rows"] = kept.keep(rows)
    return result


def of_images(origin: config.Config | None, count: int) -> Evaluation:
    """What is measured of so many images: what their run measures, else the Frechet distance."""
    usual = Evaluation(every=1, count=count, metrics=[Frechet()])
    if origin is None:
        return usual
    own: Evaluation = config.build(origin, "evaluation")
    return dataclasses.replace(own, count=count, metrics=own.metrics or usual.metrics)


class Kept:
    """The rows of a run's evaluations, in its folder: each block as it is finished, then the whole.

    A block that was measured before, by the same code on the same machine, is not measured again.

    Args:
        opened: the run.
        settings: of this evaluation.
        extractor: the features.
        reference: what is compared with.
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
        """The rows of a block that was finished before; none where there is no such."""
        key = self._key(number)
        rows = [row for row in self.history.rows() if row.get("block") == key]
        return [{k: v for k, v in row.items() if k not in ("block", "images")} for row in rows]

    def keep_block(self, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of a finished block."""
        self._write({"images": self.images, **row, "block": self._key(number)} for row in rows)

    def keep(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Write the rows of the whole, and say where they are; None where they cannot be."""
        return self._write({"images": self.images, **row} for row in rows)

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> str | None:
        try:
            self.history.append(*rows)
        # Somebody else's run, or a full disk: the numbers are shown all the same.
        except (OSError, ValueError) as error:
            print(shown(f"{self.history.path}: not kept ({error})"), file=sys.stderr)
            return None
        return str(self.history.path)

    def _key(self, number: int) -> str:
        parts = {**self.depends, "block": number}
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def show_block(number: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Say the numbers of a finished block, where there is no run to keep them in."""
    print(shown(f"block {number}: {'; '.join(map(format_row, rows))}"), file=sys.stderr)


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the numbers on stderr."""
    first = rows[0]
    lines = Table(title=Text(shown(first["name"].partition("@")[2])), box=box.SIMPLE_HEAD)
    lines.add_column("number")
    lines.add_column("value", justify="right")
    several = "blocks" in first
    for column in ("least", "spread") if several else ():
        lines.add_column(column, justify="right")
    for row in rows:
        more = [f"{row['min']:.4g}", f"{row['spread']:.2g}"] if several else []
        lines.add_row(Text(shown(row["name"].partition("@")[0])), f"{row['value']:.4g}", *more)
    Console(stderr=True).print(lines)


def what_matters(
    target: Path, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> list[str]:
    """The last three lines: the number, what it is of, and where it is kept or what comes next."""
    if not rows:
        return [f"{target}: its evaluation measures nothing; name what: --metrics NAME"]
    first = rows[0]
    model = [str(first[key]) for key in ("weights", "sampler") if first.get(key)]
    words = ", ".join([*model, f"{first['n']:,} images"])
    of = f"{result.get('checkpoint', target)}  {words}"
    alone = "nowhere but on stdout, with all that the number depends on: --json"
    where = f"kept     {result.get('rows') or alone}"
    return [f"measured {format_row(first)}", f"of       {of}", where]


def extractor_of(options: FeatureOptions, experiment: config.Config | None) -> Extractor:
    """The extractor that the command line names, else the experiment's, else what there is."""
    if options.features is not None or experiment is None:
        name = options.features or "auto"
        return extractors.load(name, options.feature_weights, options.feature_precision)
    return trust.extractor_of(experiment)


def reference_for(
    experiment: config.Config | None,
    drawn: GeneratedImages,
    settings: Evaluation,
    extractor: Extractor,
    choice: MetricChoice,
) -> Reference:
    """What images are compared with: what is named, else the evaluation's file, else the data.

    Args:
        experiment: of the run that drew them; None: something is named.
        drawn: the images.
        settings: of the evaluation.
        extractor: the features.
        choice: what the command line says.
    """
    if choice.wanted.reference is not None or experiment is None:
        return data_sets.reference_of(
            str(choice.wanted.reference),
            extractor,
            resolution=drawn.shape[1],
            keep=settings.wants_features,
            device=str(drawn.device),
            resize=choice.wanted.resize,
        )
    images = runs.images_of(experiment)
    if settings.reference is None:
        real = min(len(images), KEPT)
        settings = choice.feasible(settings, lambda m: m.check_count(settings.count, real))
    with counted("reference") as progress:
        return reference_of(
            images,
            settings,
            extractor,
            parts.REFERENCES,
            drawn.device,
            progress,
            open_file=statistics.open_any,
        )


def refuse_drawing(run: Path, sampling: SamplerOptions, options: RunOptions) -> None:
    """See that nothing is said of how images are drawn that are there already.

    Raises:
        UserError: names the option.
    """
    said = vars(sampling) | vars(options)
    for name in ("sampler", "steps", "guidance", "guidance_interval", "guide", "set"):
        if said[name] not in (None, ()):
            raise UserError(
                f"--{name.replace('_', '-')} is of a run that draws; {run} holds images, "
                "which are measured as they are"
            )


def open_given(path: Path, device: str) -> ImageFiles:
    """Images in a folder, a .zip or an .npz, in the place of drawn ones.

    Raises:
        UserError: nothing there, or images that are broken or of different sizes.
    """
    device = runs.resolve_device(device)
    if not path.exists():
        raise UserError(f"{path}: there is no such run, nor images; runs lie under {parts.RUNS}/")
    drawn = drawn_as(path)
    if path.suffix == ".npz":
        return ImageFiles(arrays(path), str(path), torch.device(device), drawn)
    images = data_sets.images_of(str(path))
    return ImageFiles(images, str(path), torch.device(device), drawn)


def drawn_by(drawn: Mapping[str, Any] | None, allow: Sequence[str]) -> config.Config | None:
    """The config of the run that drew images, as `sample` noted it: they are measured as it is.

    None where the images are of no run that is here.
    """
    named = None if drawn is None else drawn.get("run")
    if type(named) is not str or not runs.is_run(Path(named)):
        return None
    print(shown(f"as {named}, which drew them, is measured: its data, metrics"), file=sys.stderr)
    return runs.config_of(Path(named), allow)


def drawn_as(path: Path) -> dict[str, Any] | None:
    """How images were drawn that `sample` wrote: its folder, that of the images, or its .npz.

    Raises:
        UserError: not all of them are there yet.
    """
    ours = path.name in (PICTURES, "images.npz") and (path.parent / SAMPLE).is_file()
    folder = path.parent if ours else path
    said = None
    with contextlib.suppress(ValueError):  # somebody else's file of that name
        said = read_sample(folder) if (folder / PICTURES).is_dir() else None
    if said is not None and not said.get("complete"):
        raise UserError(
            f"{folder}: its images are not all drawn yet; the same `sample` command goes on"
        )
    about = ("run", "checkpoint", "first", "count", "settings")
    return None if said is None else {key: said.get(key) for key in about}
