"""A run's folder before training: whether it may be used, and what of its config may change."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusion_pl import config
from diffusion_pl.commands import parts, runs
from diffusion_pl.config import Config
from diffusion_pl.diffusion.conditions import sizes
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small, write_atomically
from diffusion_pl.names import refuse_name, shown
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History
from diffusion_pl.training.lr_schedule import WarmupDecay, is_torch_s
from diffusion_pl.training.sameness import note
from diffusion_pl.training.settings import TrainerConfig

# Keys that may change when a run is resumed: where and how fast it computes, which changes rounding
# alone; where its data lies, which is identified by its content; how often it logs, saves and
# evaluates. (Another kind of accelerator has another generator, so other noise.)
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

# Keys that may change but not be turned on or off: missing snapshots cannot be made later.
ON = {"ema.posthoc_every"}

_CONFIG, _FROM, _METRICS = "config.yaml", "from", "metrics.jsonl"


def is_claimed(folder: Path) -> bool:
    """Whether a folder holds a run: checkpoints or rows of metrics."""
    kept = folder / "checkpoints"
    if (kept / checkpoints.LATEST).exists() or checkpoints.found(kept):
        return True
    return any(kept.glob(f"*{checkpoints.DAMAGED}")) or bool(History(folder / _METRICS).rows())


def check_name(folder: Path) -> None:
    """Check the name of a new run's folder.

    Raises:
        UserError: it is not plain.
    """
    if not is_claimed(folder):
        name = folder.resolve().name
        refuse_name(name, shown(str(folder)), "name another folder with --run (RUN=...)")


def compare(experiment: Config, folder: Path, start: Path | None, done: Path | None) -> list[str]:
    """Check that a folder holds no run, or one that this experiment may resume; writes nothing.

    Args:
        experiment: to be trained.
        folder: the run's.
        start: the run or checkpoint whose weights it starts from; None: initialised.
        done: the checkpoint to resume from; None for none.

    Returns:
        The keys that change, each as a line `key: before -> now`.

    Raises:
        ConfigError: the folder holds a run of another config; names the differing keys.
        UserError: its run started from other weights, or its config or checkpoints are missing.
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
    free = FREE | _free_rates(read, experiment, images) | _free_dropout(experiment)
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
    """Check that a run starts, or started, from the given weights.

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
    """Refuse to start again over a run whose checkpoints are gone.

    One that ended before its first checkpoint may start again: it has no row beyond the step of
    that checkpoint, and no evaluation at that step, which follows the checkpoint.

    Raises:
        UserError: the run had a checkpoint.
    """
    settings, batch = _end_of(before), _batch(before)
    first = min(-(-settings.checkpoint_every // batch), settings.steps(batch)) * batch
    rows = History(folder / _METRICS).rows()
    if any(row["images"] >= first + ("name" not in row) for row in rows):
        raise UserError(
            f"{folder}: {_METRICS} has rows up to {rows[-1]['images']:,} images, but there is no "
            f"checkpoint; restore {folder / 'checkpoints'}, or remove {_METRICS} to start again"
        )


def _with_batches(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the defaults of its data section."""
    return {**tree, "data": parts.with_defaults(tree["data"])}


def _end_of(tree: Mapping[str, Any]) -> TrainerConfig:
    """The budget and checkpoint interval of a config."""
    keys = ("total_images", "checkpoint_every")
    return TrainerConfig(**{key: tree["trainer"][key] for key in keys if key in tree["trainer"]})


def _batch(tree: Mapping[str, Any]) -> int:
    size: int = tree["data"]["batch_size"]
    return size


def _is_free(line: str, free: Collection[str]) -> bool:
    """Whether a run may be resumed with a change."""
    key, _, values = line.partition(": ")
    if key in ON:
        return not {"null", "absent"} & set(values.split(" -> "))
    return any(key == each or key.startswith(f"{each}.") for each in free)


def _free_dropout(now: Config) -> set[str]:
    """Dropout of the conditions that the network does not take: it changes nothing."""
    taken = sizes(parts.meta_network(now))
    return {f"trainer.dropout.{kind}" for kind, size in taken.items() if not size}


def _free_rates(before: Config, now: Config, images: int) -> set[str]:
    """Which of budget and schedule may change: those that change the rate of no past step.

    Args:
        before: the run's config until now.
        now: its config from now on.
        images: seen so far.
    """
    configs = (before, now)
    nodes = [each.tree.get("lr_schedule") for each in configs]
    ends = [_end_of(each.tree).rounded_images(_batch(each.tree)) for each in configs]

    def rates(number: int, end: int) -> Any:
        # An unchanged schedule is built from the user's config, which is trusted.
        config = now if nodes[0] == nodes[1] else configs[number]
        schedule = parts.lr_schedule_of(config) or WarmupDecay()
        if is_torch_s(schedule):
            return nodes[number]  # independent of the budget
        return [schedule(seen, end) for seen in range(0, images, _batch(now.tree))]

    if nodes[0] == nodes[1] and ends[0] == ends[1]:
        return set()
    try:
        table = [[rates(number, end) for end in ends] for number in (0, 1)]
    except UserError:  # the run's config may name parts that are not trusted or not installed
        return set()
    same = table[0][0] == table[1][1]  # else find the one that makes the difference
    by_end = same or all(row[0] == row[1] for row in table)
    by_schedule = same or all(column[0] == column[1] for column in zip(*table, strict=True))
    return {*(["trainer.total_images"] * by_end), *(["lr_schedule"] * by_schedule)}


def write_config(experiment: Config, folder: Path) -> None:
    """Write the config of a new run into its folder."""
    if not is_claimed(folder):
        _write(experiment, folder)


def record(
    experiment: Config, folder: Path, start: Path | None, images: int, changes: list[str]
) -> None:
    """Write the run's config, the changes to it and the start of its weights into its folder.

    Args:
        experiment: of the run.
        folder: the run's.
        start: the run or checkpoint whose weights it started from; None: initialised.
        images: seen so far.
        changes: as from `compare`.
    """
    begun = folder / _FROM
    if start is not None:
        origin = f"{runs.checkpoint_of(start)}\n"
        write_atomically(begun, lambda file: file.write(origin.encode()))
    elif not is_claimed(folder):
        begun.unlink(missing_ok=True)  # of a failed start
    note(folder, images, changes)
    _write(experiment, folder)


def _write(experiment: Config, folder: Path) -> None:
    text = config.dump(experiment).encode()
    write_atomically(folder / _CONFIG, lambda file: file.write(text))
