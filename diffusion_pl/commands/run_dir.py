"""The folder of a run before it starts: free, or this experiment's; and what may have changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusion_pl import config
from diffusion_pl.commands import parts, runs
from diffusion_pl.config import Config
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small, write_atomically
from diffusion_pl.names import refuse_name, shown
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History
from diffusion_pl.training.lr_schedule import WarmupDecay, is_torch_s
from diffusion_pl.training.sameness import note
from diffusion_pl.training.settings import TrainerConfig

# What a run may go on under otherwise than it began: where and how fast it computes, which changes
# no more of it than rounding; where its data lies, which is known by its content; how often it
# speaks, is kept and is measured. (On another kind of accelerator the noise of
# an image is another draw, by the generator that is there.)
FREE = {
    "callbacks",
    "data.dataset.cache",
    "data.dataset.cache_bytes",
    "data.dataset.cache_folder",
    "data.dataset.made_of",
    "data.dataset.path",
    "data.num_workers",
    "evaluation",
    "features",
    "loggers",
    "sampler",
    "trainer.accelerator",
    "trainer.checkpoint_every",
    "trainer.compile",
    "trainer.device_batch_size",
    "trainer.devices",
    "trainer.keep",
    "trainer.keep_best",
    "trainer.keep_every",
    "trainer.log_every",
    "trainer.loggers",
    "trainer.nodes",
    "trainer.profiler",
    "trainer.read_timeout",
    "trainer.start_timeout",
    "trainer.strategy",
    "trainer.timeout",
    "trainer.wandb_entity",
    "trainer.wandb_project",
    "trainer.watchdog",
}

# Free where it is on before and after: averages that were never taken cannot be made up.
ON = {"ema.posthoc_every"}

# A file of the run's folder that says why the run would fail in the same way again.
FAILED = "FAILED"

_CONFIG, _FROM, _METRICS = "config.yaml", "from", "metrics.jsonl"


def is_claimed(folder: Path) -> bool:
    """Whether a folder holds a run: a checkpoint, or what was measured of its steps."""
    kept = folder / "checkpoints"
    if (kept / checkpoints.LATEST).exists() or checkpoints.found(kept):
        return True
    return any(kept.glob(f"*{checkpoints.DAMAGED}")) or bool(History(folder / _METRICS).rows())


def check_name(folder: Path) -> None:
    """See that a run that is to begin has a plain name, before anything of it is made.

    Raises:
        UserError: it has none.
    """
    if not is_claimed(folder):
        name = folder.resolve().name
        refuse_name(name, shown(str(folder)), "name another folder with --run (RUN=...)")


def compare(experiment: Config, folder: Path, start: Path | None, done: Path | None) -> list[str]:
    """See that a folder holds no run, or this experiment's; nothing is written.

    Args:
        experiment: what is to be trained.
        folder: the run's.
        start: the run or checkpoint whose weights it starts from, None for its own.
        done: the checkpoint that it goes on from, None for none.

    Returns:
        What the run goes on under otherwise than until now, a line `key: before -> now` each.

    Raises:
        ConfigError: the folder holds a run of another config; names the differing keys.
        UserError: its run started elsewhere, or its config or its checkpoints are gone.
    """
    if not is_claimed(folder):
        return []
    kept = folder / _CONFIG
    if not kept.exists():
        raise UserError(
            f"{folder}: holds checkpoints or {_METRICS} but no {_CONFIG}; restore it or remove them"
        )
    read = config.load(kept)
    before = read.tree
    if done is None:
        _refuse_lost(folder, before)
    _compare_start(folder, start, done)
    images = 0 if done is None else int(done.stem)
    changes = config.differences(*map(_with_batches, (before, experiment.tree)))
    free = FREE | _free_rates(read, experiment, images)
    refused = [line for line in changes if not _is_free(line, free)]
    if refused:
        raise config.ConfigError(
            f"{folder} was begun with another config; name another folder (RUN=...) or undo:\n"
            + "\n".join(f"  {line}" for line in refused)
        )
    budget = _end_of(experiment.tree)
    if images > (most := budget.rounded_images(_batch(experiment.tree))):
        raise UserError(
            f"{folder}: has seen {images:,} images, more than trainer.total_images={most}; name "
            f"a budget of at least {images}, or another folder (RUN=...)"
        )
    return changes


def _compare_start(folder: Path, start: Path | None, done: Path | None) -> None:
    """See that a run begins, or once began, with the weights that are named.

    Raises:
        UserError: it does not.
    """
    begun = folder / _FROM
    origin = read_small(begun).decode(errors="replace").strip() if begun.exists() else None
    if start is None:
        if origin is not None and done is None:
            raise UserError(f"{folder}: started from {origin}; say so again: --from {origin}")
        return
    wanted = str(runs.checkpoint_of(start))
    if wanted != origin:
        raise UserError(
            f"{folder}: started from {origin or 'weights of its own'}, not from {wanted}"
        )


def _refuse_lost(folder: Path, before: Mapping[str, Any]) -> None:
    """Refuse to begin anew over a run that has had a checkpoint.

    One that ended before its first begins anew: it has no row beyond the step of that checkpoint,
    and no evaluation of that step, which comes after it.

    Raises:
        UserError: it has had one.
    """
    settings, batch = _end_of(before), _batch(before)
    first = min(-(-settings.checkpoint_every // batch), settings.steps(batch)) * batch
    rows = History(folder / _METRICS).rows()
    if any(row["images"] >= first + ("name" not in row) for row in rows):
        raise UserError(
            f"{folder}: {_METRICS} tells of {rows[-1]['images']:,} images, but no checkpoint is "
            f"there; restore {folder / 'checkpoints'}, or remove {_METRICS} to begin anew"
        )


def _with_batches(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config with how its batches are made where it says nothing of it."""
    return {**tree, "data": parts.with_defaults(tree["data"])}


def _end_of(tree: Mapping[str, Any]) -> TrainerConfig:
    """What a config says of the budget and the checkpoints."""
    keys = ("total_images", "checkpoint_every")
    return TrainerConfig(**{key: tree["trainer"][key] for key in keys if key in tree["trainer"]})


def _batch(tree: Mapping[str, Any]) -> int:
    size: int = tree["data"]["batch_size"]
    return size


def _is_free(line: str, free: Collection[str]) -> bool:
    """Whether a run may go on under such a change."""
    key, _, values = line.partition(": ")
    if key in ON:
        return not {"null", "absent"} & set(values.split(" -> "))
    return any(key == each or key.startswith(f"{each}.") for each in free)


def _free_rates(before: Config, now: Config, images: int) -> set[str]:
    """Which of budget and schedule may be others: those that change the rate of no step so far.

    Args:
        before: what the run has been trained by.
        now: what it is to go on by.
        images: that it has seen.
    """
    configs = (before, now)
    nodes = [each.tree.get("lr_schedule") for each in configs]
    ends = [_end_of(each.tree).rounded_images(_batch(each.tree)) for each in configs]

    def rates(number: int, end: int) -> Any:
        # A schedule that has not changed is built as the user names it, and trusted so.
        config = now if nodes[0] == nodes[1] else configs[number]
        schedule = parts.lr_schedule_of(config) or WarmupDecay()
        if is_torch_s(schedule):
            return nodes[number]  # it knows of no end
        return [schedule(seen, end) for seen in range(0, images, _batch(now.tree))]

    if nodes[0] == nodes[1] and ends[0] == ends[1]:
        return set()
    try:
        table = [[rates(number, end) for end in ends] for number in (0, 1)]
    except UserError:  # a run's own config may name what is not trusted, or not there
        return set()
    same = table[0][0] == table[1][1]  # else name the one that makes the difference
    by_end = same or all(row[0] == row[1] for row in table)
    by_schedule = same or all(column[0] == column[1] for column in zip(*table, strict=True))
    return {*(["trainer.total_images"] * by_end), *(["lr_schedule"] * by_schedule)}


def write_config(experiment: Config, folder: Path) -> None:
    """Write into a folder that holds no run yet what is to be trained there."""
    if not is_claimed(folder):
        _write(experiment, folder)


def record(
    experiment: Config, folder: Path, start: Path | None, images: int, changes: list[str]
) -> None:
    """Keep in a run's folder what it is trained by from now on.

    Args:
        experiment: what is trained.
        folder: the run's.
        start: the run or checkpoint whose weights it started from, None for its own.
        images: that it has seen.
        changes: as `compare` gives them.
    """
    begun = folder / _FROM
    if start is not None:
        origin = f"{runs.checkpoint_of(start)}\n"
        write_atomically(begun, lambda file: file.write(origin.encode()))
    elif not is_claimed(folder):
        begun.unlink(missing_ok=True)  # of a start that failed
    note(folder, images, changes)
    _write(experiment, folder)


def _write(experiment: Config, folder: Path) -> None:
    text = config.dump(experiment).encode()
    write_atomically(folder / _CONFIG, lambda file: file.write(text))
