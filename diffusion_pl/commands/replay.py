"""`replay`: repeat one step of a run to inspect it, such as one whose loss was not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_pl import config
from diffusion_pl.commands import parts, runs, train
from diffusion_pl.commands.options import Allow, Integer
from diffusion_pl.commands.results import Result
from diffusion_pl.errors import UserError
from diffusion_pl.images import grid, save_png
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.replay import replay
from diffusion_pl.training.sanity import NonFiniteError

FAILURES: tuple[type[Exception], ...] = (NonFiniteError,)


def command(run: Path, /, *, step: Integer, out: Path | None = None, allow: Allow = ()) -> Result:
    """Repeat one step of a run: its images, noise levels, losses and gradient.

    Writes its images clean, with noise and denoised; to inspect a loss that was not finite.

    Example: diffusion_pl replay runs/mine --step 1200

    Args:
        run: a run's folder.
        step: number of steps before it.
        out: folder of the image; RUN/replay when not given.
    """
    if step < 0:
        raise UserError(f"--step must not be negative (got {step})")
    if not runs.is_run(run):
        raise UserError(f"{run}: is no run (no config.yaml); name a run's folder")
    kept = run / "config.yaml"
    tree = config.load(kept).tree
    experiment = config.load_resolved(tree, str(kept), allow)
    parts.bind(experiment)
    built = train.build(experiment)
    batch_size = built.data.batch_size
    if step >= (steps := built.settings.steps(batch_size)):
        raise UserError(f"--step must be below the run's {steps:,} steps (got {step:,})")
    before = checkpoint_before(run / "checkpoints", step * batch_size)
    if before is None and (run / "from").exists():
        raise UserError(
            f"{run}: started from other weights, and has no checkpoint before step {step}; replay "
            "a later one"
        )
    found = replay(built, before, step)
    path = (out or run / "replay") / f"{step:09d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid(found.shown.flatten(0, 1), columns=len(found.positions)), path)
    labels: Sequence[int | None] = found.labels or [None] * len(found.positions)
    fields = ("position", "index", "file", "label", "sigma", "loss")
    columns = (found.positions, found.indices, found.files, labels, found.sigmas, found.losses)
    worst = sorted(found.norms, key=lambda name: -_rank(found.norms[name]))
    result = {
        "run": str(run),
        "step": step,
        "checkpoint": None if before is None else str(before),
        "loss": _number(found.losses.mean()),
        "gradient_norm": _number(math.hypot(*found.norms.values())),
        "largest_gradients": {name: _number(found.norms[name]) for name in worst[:5]},
        "images": [
            dict(zip(fields, (*row[:4], *map(_number, row[4:])), strict=True))
            for row in zip(*columns, strict=True)
        ],
        "picture": str(path),
    }
    return Result(result)


def _number(value: Any) -> float | str:
    """A number for JSON, which has no nan and inf: these as strings."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _rank(norm: float) -> float:
    """The norm; nan counts as the largest."""
    return math.inf if math.isnan(norm) else norm


def checkpoint_before(folder: Path, images: int) -> Path | None:
    """The newest checkpoint of at most so many images; None where there is none."""
    for path in reversed(checkpoints.found(folder)):
        if int(path.stem) <= images:
            checkpoints.verify(path)
            return path
    return None
