"""`ema`: measure post-hoc averages of several lengths and export the best (EDM2, section 3).

The averages are made of the run's snapshots, see `training.power_ema`. Blocks that were measured
before are read from RUN/evaluations.jsonl, so the same command goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffusion_pl.commands import card, evaluate, export, hints, runs
from diffusion_pl.commands.compare import interval_of
from diffusion_pl.commands.options import (
    FeatureOptions,
    Integer,
    MetricOptions,
    Numbers,
    RunOptions,
    RunPath,
    SamplerOptions,
)
from diffusion_pl.commands.results import Result, line
from diffusion_pl.errors import UserError
from diffusion_pl.interop import weights as ours
from diffusion_pl.names import plain, shown
from diffusion_pl.training import power_ema
from diffusion_pl.training.best import HIGHER


@dataclass(frozen=True)
class Point:
    """One average, measured.

    Args:
        length: sigma_rel, its standard deviation over the training so far.
        name: of the number.
        value: mean over the blocks.
        blocks: the number of each block.
        misfit: relative error of the profile that the snapshots make, 0 for an exact one.
    """

    length: float
    name: str
    value: float
    blocks: Sequence[float]
    misfit: float

    @property
    def weights(self) -> str:
        """As the option of other commands."""
        return f"ema:{self.length:g}"

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean; None of one block."""
        return interval_of(self.blocks) if len(self.blocks) > 1 else None


def command(
    run: RunPath,
    /,
    *,
    lengths: Numbers = (0.05, 0.075, 0.1, 0.15, 0.2),
    blocks: Integer = 3,
    out: Path | None = None,
    options: RunOptions = RunOptions(),
    wanted: MetricOptions = MetricOptions(),
    features: FeatureOptions = FeatureOptions(),
) -> Result:
    """Measure post-hoc averages of several lengths, and export the best with a model card.

    The first number of the metrics decides. The run must have kept snapshots: ema.posthoc_every.

    Example: diffusion_pl ema runs/mine --lengths 0.05,0.1,0.15 --metrics frechet

    Args:
        lengths: sigma_rel of the averages, in (0, 0.25]; all are measured on the same noise.
        blocks: disjoint blocks of images, for the 95 % interval of each number.
        out: the weights of the best, safetensors; RUN/ema.safetensors when not given.
    """
    checkpoint = runs.checkpoint_of(run)
    folder = checkpoint.parent.parent
    dest = out or folder / "ema.safetensors"
    for path in (dest, card.path_of(dest, "safetensors")):
        if path.exists():
            raise UserError(f"{path}: exists already; name another file: --out")
    if not lengths:
        raise UserError("--lengths: name at least one, such as 0.1")
    model = runs.open_model(run, "ema", options.allow, options.set)
    snapshots = folder / power_ema.FOLDER
    recipes = {
        length: power_ema.recipe(snapshots, model.images, length)
        for length in dict.fromkeys(lengths)
    }
    points = []
    for length, recipe in recipes.items():
        points.append(_measured(run, length, recipe.misfit, blocks, options, wanted, features))
        text = f"{points[-1].name} = {points[-1].value:.4g}  length {length:g}"
        print(shown(text), file=sys.stderr)
    best = best_of(points)
    _table(points, best)
    chosen = runs.open_model(run, best.weights, options.allow, options.set)
    about = {**export.known(chosen, best.weights), "chosen_by": [_brief(p) for p in points]}
    ours.write(dest, chosen.denoiser.state_dict(), about)
    beside = card.path_of(dest, "safetensors")
    card.write(beside, chosen, best.weights, dest, "safetensors")
    result = {
        "name": best.name,
        "points": [_brief(point) for point in points],
        "best": best.length,
        "written": str(dest),
        "card": str(beside),
    }
    said = [
        line("best", f"length {best.length:g}, {best.name} = {best.value:.4g}"),
        *([line("but", unsure)] if (unsure := undecided(points, best)) else []),
        line("written", dest),
        line("card", beside),
    ]
    after = hints.next_line("import", "safetensors", dest, f"runs/{plain(dest.stem)}")
    return Result(result, said, [after], indent=2)


def best_of(points: Sequence[Point]) -> Point:
    """The point of the best value: the lowest, or the highest where higher is better."""
    higher = HIGHER.get(points[0].name.partition("@")[0], False)
    return (max if higher else min)(points, key=lambda point: point.value)


def above(point: Point, best: Point) -> tuple[float, float] | None:
    """The 95 % interval of a point's number less that of the best; None of one block.

    All lengths are measured on the same noise, so blocks are compared in pairs: the chance that
    they share falls out.
    """
    pairs = list(zip(point.blocks, best.blocks, strict=True))
    return interval_of([own - other for own, other in pairs]) if len(pairs) > 1 else None


def undecided(points: Sequence[Point], best: Point) -> str | None:
    """What the intervals leave open, in words; None where the best is told from all others."""
    ends = {point.length: above(point, best) for point in points if point is not best}
    if len(best.blocks) < 2:
        return "one block has no interval; --blocks 3 gives one"
    same = [f"{length:g}" for length, each in ends.items() if each and each[0] <= 0 <= each[1]]
    return f"{', '.join(same)} cannot be told from it on these images" if same else None


def _measured(
    run: Path,
    length: float,
    misfit: float,
    blocks: int,
    options: RunOptions,
    wanted: MetricOptions,
    features: FeatureOptions,
) -> Point:
    """Measure the average of one length."""
    sampling = SamplerOptions(weights=f"ema:{length:g}")
    opened = runs.open_run(run, sampling, options)
    rows: list[dict[str, Any]] = evaluate.measured(opened, blocks, options, wanted, features)[
        "measures"
    ]
    if not rows:
        raise UserError(f"{run}: its evaluation has no metrics; name one: --metrics NAME")
    row = rows[0]
    return Point(length, row["name"], row["value"], row.get("blocks", [row["value"]]), misfit)


def _brief(point: Point) -> dict[str, Any]:
    return {**dataclasses.asdict(point), "interval": point.interval}


def _table(points: Sequence[Point], best: Point) -> None:
    """Print the points on stderr."""
    lines = Table(title=Text(shown(points[0].name)))
    heads = ("length", "value", "95 % interval", "less the best", "lowest block", "profile error")
    for column in (*heads, "best"):
        lines.add_column(column, justify="right")
    for point in points:
        ends, apart = point.interval, above(point, best)
        lines.add_row(
            f"{point.length:g}",
            f"{point.value:.4g}",
            "-" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}",
            "-" if apart is None or point is best else f"{apart[0]:.3g} to {apart[1]:.3g}",
            f"{min(point.blocks):.4g}",
            f"{100 * point.misfit:.1f} %",
            "best" if point is best else "",
        )
    Console(stderr=True).print(lines)
