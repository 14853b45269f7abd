"""Which config files are untrusted: those of runs, and files beside a checkpoint."""

from __future__ import annotations

from pathlib import Path

# Names by which the folder of a run, or of weights, is recognised.
RUNS = Path("runs")
RESOLVED = "config.yaml"
_RESOLVED_NAMES = (RESOLVED, "config.yml")
CHECKPOINTS = "checkpoints"
WEIGHTS = (".ckpt", ".safetensors")


def is_untrusted(file: Path, experiments: Path, beside: Path | None = None) -> bool:
    """Tell whether others may have written a config file.

    Runs and checkpoints are shared, and their config says what is built. A file is untrusted if it

    - lies beside or below the run or checkpoint that training starts from;
    - is called config.yaml, as that of every run;
    - lies in a folder with weights, below a run's folder, or below runs/.

    Any other YAML, and an experiment by its name, is the user's own, unless it is a link to one of
    these or lies beside what training starts from.

    Args:
        file: an existing file.
        experiments: the folder of the user's experiments.
        beside: the run's folder or the checkpoint that training starts from.
    """
    real = file.resolve()
    if beside is not None and real.is_relative_to(_home(beside.resolve())):
        return True
    if real.parent == experiments.resolve():
        return False
    run = any(
        (folder / RESOLVED).is_file() and (folder / CHECKPOINTS).is_dir() for folder in real.parents
    )
    below_runs = any(each.is_relative_to(RUNS.resolve()) for each in (real, file.absolute()))
    named = any(each.name.lower() in _RESOLVED_NAMES for each in (real, file))
    return run or below_runs or named or _holds_weights(real.parent)


def _home(start: Path) -> Path:
    """The folder of a run or checkpoint."""
    folder = start if start.is_dir() else start.parent
    return folder.parent if folder.name == CHECKPOINTS else folder


def _holds_weights(folder: Path) -> bool:
    """Whether a folder has checkpoints or weights."""
    if (folder / CHECKPOINTS).is_dir():
        return True
    try:
        return any(each.suffix.lower() in WEIGHTS for each in folder.iterdir())
    except OSError:  # unreadable: assume so
        return True
