"""Options of sbatch that a user adds, none of which may contradict the job.

SLURM uses the last of two equal options, while the script, srun and the trainer use the job's own:
cores would be reserved that no process gets, or the job would fail on its nodes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from diffusion_pl.errors import UserError

# The options that `launch` sets, by all of sbatch's names, and `launch`'s own option for each.
_OURS = {
    "--nodes": "--nodes N",
    "--ntasks": "--gpus N or --tasks N, a node",
    "--ntasks-per-node": "--gpus N or --tasks N",
    "--tasks-per-node": "--gpus N or --tasks N",
    "--ntasks-per-gpu": "--gpus N",
    "--ntasks-per-core": "--cpus N",
    "--ntasks-per-socket": "--cpus N",
    "--cpus-per-task": "--cpus N",
    "--cpus-per-gpu": "--cpus N",
    "--gpus": "--gpus N, a node",
    "--gpus-per-node": "--gpus N",
    "--gpus-per-task": "--gpus N",
    "--gpus-per-socket": "--gpus N",
    "--gres": "--gpus N",
    "--time": "--time",
    "--signal": "--margin SECONDS",
    "--array": "--sweep",
    "--requeue": "",
    "--no-requeue": "",
    "--open-mode": "",
    "--wrap": "",
}
_SHORT = {
    "-N": "--nodes", "-n": "--ntasks", "-c": "--cpus-per-task", "-G": "--gpus", "-t": "--time",
    "-a": "--array", "-p": "--partition", "-A": "--account", "-J": "--job-name", "-o": "--output",
    "-e": "--error", "-q": "--qos", "-C": "--constraint", "-w": "--nodelist", "-x": "--exclude",
    "-d": "--dependency", "-D": "--chdir", "-L": "--licenses", "-M": "--clusters",
}  # fmt: skip

# Environment variables that for sbatch override the options in a script.
_VARIABLES = (
    "SBATCH_ARRAY_INX", "SBATCH_CPUS_PER_GPU", "SBATCH_GPUS", "SBATCH_GPUS_PER_NODE",
    "SBATCH_GPUS_PER_TASK", "SBATCH_GRES", "SBATCH_NO_REQUEUE", "SBATCH_OPEN_MODE",
    "SBATCH_REQUEUE", "SBATCH_SIGNAL", "SBATCH_TIMELIMIT",
)  # fmt: skip


def check_options(options: Sequence[str], own: Mapping[str, str], tasks: int) -> None:
    """Check that further options agree with the job and with each other.

    Args:
        options: as typed after `--sbatch`.
        own: the job's, by their long names, such as {"--nodes": "2"}.
        tasks: of the job's array, 1 for none.

    Raises:
        UserError: names the first that does not, and what to use in its place.
    """
    seen: dict[str, str] = {}
    for option in options:
        name, value = _parsed(option)
        if value != seen.setdefault(name, value):
            raise UserError(f"--sbatch: {name} is given twice ({seen[name]} and {value}); give one")
        if name not in _OURS or _agrees(name, value, own, tasks):
            continue
        instead = f"; use {_OURS[name]}" if _OURS[name] else "; leave it out"
        job = f" (the job has {own[name]})" if own.get(name) else ""
        raise UserError(f"--sbatch: {option!r} contradicts the job{job}{instead}")


def _parsed(option: str) -> tuple[str, str]:
    """An option's long name and its value."""
    long = re.fullmatch(r"(--[a-z][a-z-]*)(?:[= ]\s*(.*))?", option)
    if long:
        return long[1], long[2] or ""
    short = re.fullmatch(r"(-[A-Za-z])[= ]?\s*(.*)", option)
    if not short:
        raise UserError(
            f"--sbatch: {option!r} is no option of sbatch; write it as --sbatch=--partition=NAME"
        )
    return _SHORT.get(short[1], short[1]), short[2]


def _agrees(name: str, value: str, own: Mapping[str, str], tasks: int) -> bool:
    """Whether an option equals the job's own."""
    if name == "--requeue":
        return True
    if name == "--gres":
        gpus = [each for each in value.split(",") if each.split(":")[0] == "gpu"]
        return all(_count(each) == own.get("--gpus-per-node") for each in gpus)
    if name == "--gpus-per-node":
        return _count(value) == own.get(name)
    if name == "--array":  # which may limit how many run at once
        return re.sub(r"%[0-9]+$", "", value) == f"0-{tasks - 1}"
    if name == "--open-mode":
        return value == "append"
    return bool(value) and value == own.get(name)


def _count(value: str) -> str:
    """The number of GPUs in `4`, `gpu:4` or `gpu:a100:4`; 1 when not given."""
    last = value.rpartition(":")[2]
    return last if last.isdecimal() else "1"


def environment() -> dict[str, str]:
    """The environment for sbatch, without variables that override the job's options."""
    return {name: value for name, value in os.environ.items() if name not in _VARIABLES}
