"""Which files of settings others may have made: those of runs, and what lies with a checkpoint."""

from __future__ import annotations

from pathlib import Path

# What a run's folder, or a folder that was handed on, shows.
RUNS = Path("runs")
RESOLVED = "config.yaml"
_RESOLVED_NAMES = (RESOLVED, "config.yml")
CHECKPOINTS = "checkpoints"
WEIGHTS = (".ckpt", ".safetensors")


def is_untrusted(file: Path, experiments: Path, beside: Path | None = None) -> bool:
    """Tell whether others may have made a file of settings.

    A run and its checkpoints are handed on from one to another, and the settings in them say what
    is built. A file is theirs that

    - lies with the run or checkpoint that training starts from, or below it;
    - is called config.yaml, as the one of every run;
    - lies in a folder with weights, below a run's folder, or below runs/.

    Any other YAML is the user's own, and so is an experiment by its name, unless it is a link to
    one of these or lies with what training starts from.

    Args:
        file: of settings; there.
        experiments: the folder of the user's experiments.
        beside: a run's folder or a checkpoint.
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
    """The folder that was handed on with a run or checkpoint."""
    folder = start if start.is_dir() else start.parent
    return folder.parent if folder.name == CHECKPOINTS else folder


def _holds_weights(folder: Path) -> bool:
    """Whether a folder is one of a run, or of weights and their settings."""
    if (folder / CHECKPOINTS).is_dir():
        return True
    try:
        return any(each.suffix.lower() in WEIGHTS for each in folder.iterdir())
    except OSError:  # what cannot be seen may be there
        return True
