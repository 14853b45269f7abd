"""`sweep`: evaluate a run with many samplers; a table, a plot and the Pareto front.

Every point is a row of RUN/sweep/rows.jsonl with all that it depends on; the same command again
evaluates only the missing points.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffusion_pl import config
from diffusion_pl.commands import evaluate, runs
from diffusion_pl.commands.metric_choice import MetricChoice
from diffusion_pl.commands.options import (
    FeatureOptions,
    Integers,
    MetricOptions,
    RunOptions,
    RunPath,
    SamplerOptions,
    SeveralGuidance,
    SeveralWeights,
    Words,
)
from diffusion_pl.commands.options import guidance as parsed
from diffusion_pl.commands.results import Result
from diffusion_pl.diffusion.classifier_free import is_plain
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation, ImageGenerator
from diffusion_pl.evaluation import evaluate as measure
from diffusion_pl.evaluation.pareto import pareto
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.reference import Reference
from diffusion_pl.names import shown
from diffusion_pl.progress import counted
from diffusion_pl.training import checkpoint as kept
from diffusion_pl.training.history import History

AXES = ("checkpoint", "weights", "sampler", "steps", "guidance")


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination of settings; None stands for the run's own.

    Args:
        checkpoint: the file.
        weights: "ema", "denoiser" or "ema:LENGTH".
        sampler: its name.
        steps: of the sampler.
        guidance: weight, or KIND=NUMBER+KIND=NUMBER.
    """

    checkpoint: str
    weights: str
    sampler: str | None
    steps: int | None
    guidance: float | str | None

    @property
    def weight(self) -> float | dict[str, float] | None:
        """The guidance as samplers take it."""
        if isinstance(self.guidance, str):
            return parsed(self.guidance.replace("+", ","))
        return self.guidance

    def sampling(self) -> SamplerOptions:
        """As options of a command."""
        return SamplerOptions(
            sampler=self.sampler, steps=self.steps, guidance=self.weight, weights=self.weights
        )


def command(
    run: RunPath,
    /,
    *,
    samplers: Words | None = None,
    steps: Integers | None = None,
    guidance: SeveralGuidance | None = None,
    weights: SeveralWeights = ("ema",),
    checkpoints: bool = False,
    out: Path | None = None,
    options: RunOptions = RunOptions(),
    wanted: MetricOptions = MetricOptions(),
    features: FeatureOptions = FeatureOptions(),
) -> Result:
    """Evaluate a run with many samplers: table, plot, Pareto front.

    Evaluates every combination that is not yet in the table.

    Example: diffusion_pl sweep runs/mine --samplers heun,deis --steps 8,16,32

    Args:
        samplers: the run's own when not given.
        steps: of the samplers.
        guidance: weights: 1,2,4; of a kind of condition text=2,text=4; of several text=2+label=1.5.
        weights: ema, denoiser (raw), ema:0.05 (the average of that length), ...
        checkpoints: every checkpoint of the run, not only the newest.
        out: folder of the table; RUN/sweep when not given.
    """
    every = points(run, checkpoints, weights, samplers, steps, guidance)
    first = every[0]
    model = runs.open_model(Path(first.checkpoint), first.weights, options.allow, options.set)
    # Every point is checked before the first is evaluated.
    generators = {
        point: runs.make_generator(model, point.sampling(), _at(options, point))[0]
        for point in every
    }
    extractor = evaluate.extractor_of(features, model.config)
    choice = MetricChoice(wanted, options)
    settings = choice.settings(config.build(model.config, "evaluation"))
    reference = evaluate.reference_for(model.config, generators[first], settings, extractor, choice)
    settings = choice.feasible(settings, lambda m: m.build(extractor, reference, settings.count))
    folder = out or model.checkpoint.parent.parent / "sweep"
    folder.mkdir(parents=True, exist_ok=True)
    history = History(folder / "rows.jsonl", point=str)
    keys = {
        point: _key(point, generator, settings, extractor, reference)
        for point, generator in generators.items()
    }
    rows = []
    for point, key in keys.items():
        found = [row for row in history.rows() if row["point"] == key]
        if not found:
            found = _evaluate(point, options, settings, extractor, reference)
            for row in found:
                history.append({"point": key, **row})
        rows.append({**found[0], **dataclasses.asdict(point)})
        text = f"{rows[-1]['name']} = {rows[-1]['value']:.4g}  {_describe(point)}"
        print(shown(text), file=sys.stderr)
    best = {
        cost: pareto([row[cost] for row in rows], [row["value"] for row in rows])
        for cost in ("evaluations", "seconds")
    }
    table(rows, best)
    plot(rows, folder / "sweep.png")
    result = {
        "rows": str(history.path),
        "plot": str(folder / "sweep.png"),
        "points": [_brief(row) for row in rows],
        "pareto": {
            cost: [_brief(rows[index]) for index in chosen] for cost, chosen in best.items()
        },
    }
    return Result(result, indent=2)


def points(
    run: Path,
    checkpoints: bool,
    weights: Sequence[str],
    samplers: Sequence[str] | None,
    steps: Sequence[int] | None,
    guidance: Sequence[float | str] | None,
) -> list[Point]:
    """Every combination, in the order of the axes.

    Raises:
        UserError: there is no checkpoint.
    """
    files = [str(runs.checkpoint_of(run))]
    if checkpoints:
        files = [str(path) for path in kept.found(run / "checkpoints")]
        if not files:
            raise UserError(f"{run}: has no checkpoints")
    axes: tuple[Sequence[Any], ...] = (
        files,
        weights,
        samplers or [None],
        steps or [None],
        guidance or [None],
    )
    return [Point(*values) for values in itertools.product(*axes)]


def table(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Sequence[int]]) -> None:
    """Print the points on stderr; marks the Pareto fronts over evaluations and over seconds."""
    title = shown(rows[0]["name"])
    lines = Table(title=Text(title))
    varied = [axis for axis in AXES if len({row[axis] for row in rows}) > 1]
    for axis in varied:
        lines.add_column(axis)
    for column in ("evaluations", "seconds", "value", "best"):
        lines.add_column(column, justify="right")
    for index, row in enumerate(rows):
        marks = [name for name, chosen in best.items() if index in chosen]
        lines.add_row(
            *(Text(_short(row[axis])) for axis in varied),
            f"{row['evaluations']:,}",
            f"{row['seconds']:.1f}",
            f"{row['value']:.4g}",
            " ".join(marks),
        )
    Console(stderr=True).print(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the metric against evaluations and seconds, a line for each sampler and guidance."""
    import matplotlib.pyplot as plt  # a second of CPU

    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        varied = [axis for axis in AXES if axis != "steps" and len({r[axis] for r in rows}) > 1]
        lines.setdefault(" ".join(_short(row[axis]) for axis in varied), []).append(row)
    for axes, cost in zip(panels, ("evaluations", "seconds"), strict=True):
        for name, line in lines.items():
            ordered = sorted(line, key=lambda row: row[cost])
            costs = [row[cost] for row in ordered]
            axes.plot(
                costs, [row["value"] for row in ordered], "o-", label=_plot_text(name) or None
            )
        axes.set(
            xlabel=f"{cost}{' an image' * (cost == 'evaluations')}",
            xscale=scale([row[cost] for row in rows]),
            yscale=scale([row["value"] for row in rows]),
        )
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel(_plot_text(rows[0]["name"].partition("/")[0]))
    figure.suptitle(_plot_text(rows[0]["name"]), fontsize="small")
    if len(lines) > 1:
        panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_text(name: str) -> str:
    """A name in a plot; matplotlib takes text between two $ for a formula."""
    return shown(name).replace("$", r"\$")


def scale(values: Sequence[float]) -> str:
    """Logarithmic over more than a decade; a shorter logarithmic axis has too few labels."""
    low, high = min(values), max(values)
    return "log" if low > 0 and high > 10 * low else "linear"


def _evaluate(
    point: Point,
    options: RunOptions,
    settings: Evaluation,
    extractor: Extractor,
    reference: Reference,
) -> list[dict[str, Any]]:
    opened = runs.open_run(Path(point.checkpoint), point.sampling(), _at(options, point))
    with counted(_describe(point)) as progress:
        rows, _ = measure(opened.generator, settings, extractor, reference, progress=progress)
    return rows


def _at(options: RunOptions, point: Point) -> RunOptions:
    """The run's options at one point; without guidance there is no guide."""
    if point.weight is not None and is_plain(point.weight):
        return dataclasses.replace(options, guide=None, guidance_interval=None)
    return options


def _key(
    point: Point,
    generator: ImageGenerator,
    settings: Evaluation,
    extractor: Extractor,
    reference: Reference,
) -> str:
    """All that a point's number depends on, as one line."""
    about = generator.about()
    chosen = ["sampler", "guidance", "guidance_interval", "guide", "precision"]
    chosen += [key for key in ("captions", "prompt", "prompts", "source") if key in about]
    parts = {"checkpoint": point.checkpoint, "weights": point.weights} | {
        **{key: about[key] for key in chosen},
        "count": settings.count,
        "seed": settings.seed,
        "metrics": [str(metric) for metric in settings.metrics],
        "extractor": f"{extractor.name}-{extractor.digest}-{extractor.precision}",
        "reference": reference.fingerprint,
    }
    if point.weights.startswith("ema:"):
        parts["ema"] = "coefficients of sum 1"  # older rows used scaled weights
    return json.dumps(parts, sort_keys=True)


def _describe(point: Point) -> str:
    given = {key: value for key, value in vars(point).items() if value is not None}
    return "  ".join(f"{key} {_short(value)}" for key, value in given.items())


def _short(value: Any) -> str:
    """A checkpoint by its number of images, anything else as it is."""
    text = "own" if value is None else str(value)
    images = Path(text).stem
    return f"{int(images):,}" if text.endswith(".ckpt") and images.isdecimal() else shown(text)


def _brief(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in (*AXES, "evaluations", "seconds", "name", "value")}
