"""The folder of a run before it starts: made with its config, or seen to be the experiment's."""

from __future__ import annotations

from pathlib import Path

from diffusion_pl import config, ranks
from diffusion_pl.commands import runs
from diffusion_pl.config import Config
from diffusion_pl.files import regular
from diffusion_pl.names import refuse_name, shown
from diffusion_pl.training.writing import write_atomically

# Where and how fast a run computes, which changes no more of it than rounding: it may go on under
# others than it began with. (On another kind of accelerator the noise of an image is another draw,
# by the generator that is there.)
FREE = {
    "data.workers",
    "trainer.accelerator",
    "trainer.compile",
    "trainer.device_batch_size",
    "trainer.devices",
    "trainer.keep",
    "trainer.keep_best",
    "trainer.loggers",
    "trainer.nodes",
    "trainer.read_timeout",
    "trainer.start_timeout",
    "trainer.strategy",
    "trainer.timeout",
    "trainer.wandb_entity",
    "trainer.wandb_project",
    "trainer.watchdog",
}

# A file of the run's folder that says why the run would fail in the same way again.
FAILED = "FAILED"


def settle(experiment: Config, folder: Path, start: Path | None = None) -> None:
    """Make the run's folder with its config, or see that it is this experiment's.

    The first process of a run writes; the others see what is there.

    Args:
        experiment: what is to be trained.
        folder: the run's.
        start: the run or checkpoint whose weights it starts from, kept in `from`.

    Raises:
        ConfigError: the folder holds a run of another config; names the differing keys.
        ValueError: the folder cannot be written, or its run started elsewhere.
    """
    compare(experiment, folder, start)
    if not ranks.leads_run():
        return
    if start is not None:
        begun = f"{runs.checkpoint_of(start)}\n"
        write_atomically(folder / "from", lambda file: file.write(begun.encode()))
    kept = folder / "config.yaml"
    if not kept.exists() or _changes(kept, experiment):
        write_atomically(kept, lambda file: file.write(config.dump(experiment).encode()))


def compare(experiment: Config, folder: Path, start: Path | None = None) -> None:
    """See that a folder holds no run, or this experiment's; nothing is written.

    Raises:
        ConfigError: as `settle`.
        ValueError: as `settle`.
    """
    kept, begun = folder / "config.yaml", folder / "from"
    if not kept.exists():
        name = folder.resolve().name
        refuse_name(name, shown(str(folder)), "name another folder with --run (RUN=...)")
        if (folder / "checkpoints").exists():
            raise ValueError(
                f"{folder} holds checkpoints but no config.yaml; restore it or remove them"
            )
        return
    if start is not None:
        wanted = f"{runs.checkpoint_of(start)}\n"
        before = regular(begun).read_text() if begun.exists() else "weights of its own\n"
        if wanted != before:
            raise ValueError(f"{folder}: started from {before.strip()}, not from {wanted.strip()}")
    changes = [line for line in _changes(kept, experiment) if not _is_free(line)]
    if changes:
        raise config.ConfigError(
            f"{folder} was begun with another config; name another folder (RUN=...) or undo:\n"
            + "\n".join(f"  {line}" for line in changes)
        )


def _changes(kept: Path, experiment: Config) -> list[str]:
    """Where an experiment differs from the config that a run was begun with, a line a key."""
    return config.differences(config.load(kept).tree, experiment.tree)


def _is_free(line: str) -> bool:
    """Whether such a line is about where or how fast a run computes."""
    key = line.partition(":")[0]
    return any(key == free or key.startswith(f"{free}.") for free in FREE)
