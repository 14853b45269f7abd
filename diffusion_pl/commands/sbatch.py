"""A SLURM job: its tasks, its script, and submitting it."""

from __future__ import annotations

import itertools
import math
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_pl.commands import sbatch_options
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import write_atomically
from diffusion_pl.names import shown

SCRIPT = "job.sbatch"
TEMPLATE = Path(__file__).with_name(SCRIPT)

# Consecutive starts without a newer checkpoint, after which a job is not requeued.
RESTARTS = 3

# Seconds by which SLURM's signal may be early.
CLOCK = 60.0
# Saves that must fit between the signal and the limit, as many writers slow a file system down.
SAVES = 3.0


@dataclass(frozen=True)
class Task:
    """One run of a job.

    Args:
        run: the run's folder.
        words: what follows `train`: the experiment and its overrides.
        allow: packages, addresses or files to trust in the experiment's file.
        data_changed: resume though the data has changed.
    """

    run: Path
    words: tuple[str, ...]
    allow: tuple[str, ...] = ()
    data_changed: bool = False

    def line(self) -> tuple[str, ...]:
        """The words after `train` on the command line."""
        changed = ["--data-changed"] if self.data_changed else []
        return (*self.words, *(f"--allow={name}" for name in self.allow), *changed)


@dataclass(frozen=True)
class Job:
    """A SLURM job.

    Args:
        folder: of the script and SLURM's output.
        tasks: the runs; several make an array.
        nodes: of each run.
        ranks: processes per node.
        on_gpu: whether each process has a GPU.
        cpus: cores per process.
        time: limit, in SLURM's format.
        margin: seconds before the limit at which a run is signalled to stop.
        command: that made the job.
        place: the folder to run in.
        python: words that start Python there.
        options: further options of sbatch.
    """

    folder: Path
    tasks: Sequence[Task]
    nodes: int
    ranks: int
    on_gpu: bool
    cpus: int
    time: str
    margin: int
    command: str
    place: Path
    python: Sequence[str]
    options: Sequence[str] = ()

    @property
    def script(self) -> Path:
        """The script's path."""
        return self.folder / SCRIPT

    def check_options(self) -> None:
        """Check that the further options agree with the job.

        Raises:
            UserError: names one that does not.
        """
        own = {
            "--nodes": str(self.nodes),
            "--ntasks": str(self.nodes * self.ranks),
            "--ntasks-per-node": str(self.ranks),
            "--tasks-per-node": str(self.ranks),
            "--cpus-per-task": str(self.cpus),
            "--time": self.time,
        }
        if self.on_gpu:
            own |= {"--gpus-per-node": str(self.ranks), "--gpus": str(self.nodes * self.ranks)}
        sbatch_options.check_options(self.options, own, len(self.tasks))

    def directives(self) -> list[str]:
        """The script's #SBATCH options."""
        array = len(self.tasks) > 1
        output = self.place / self.folder / ("slurm-%A_%a.out" if array else "slurm-%j.out")
        return [
            f"--job-name={self.folder.name}",
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={self.ranks}",  # Lightning refuses --ntasks
            *([f"--gpus-per-node={self.ranks}"] if self.on_gpu else []),
            f"--cpus-per-task={self.cpus}",
            f"--time={self.time}",
            f"--signal=USR1@{self.margin}",
            *([f"--array=0-{len(self.tasks) - 1}"] if array else []),
            "--requeue",
            "--open-mode=append",
            f"--output={output}",
            *self.options,
        ]


def render(job: Job) -> str:
    """The script, from the template beside this module."""
    on = f"{job.nodes} nodes x {job.ranks} {'GPUs' if job.on_gpu else 'CPU processes'}"
    runs = job.tasks[0].words[0] if len(job.tasks) == 1 else f"{len(job.tasks)} runs"
    values = {
        "what": shown(f"{runs} on {on}"),
        "command": shown(job.command),
        "directives": "\n".join(f"#SBATCH {_quoted(option)}" for option in job.directives()),
        "place": shlex.quote(str(job.place)),
        "tasks": "\n".join(
            f"  {number}) RUN={shlex.quote(str(task.run))} WORDS=({shlex.join(task.line())}) ;;"
            for number, task in enumerate(job.tasks)
        ),
        "python": shlex.join(job.python),
        "threads": "1" if job.on_gpu else str(job.cpus),
        "cpus": str(job.cpus),
        "restarts": str(RESTARTS),
        "script": shlex.quote(str(job.script)),
    }
    return re.sub(r"@\{(\w+)\}", lambda found: values[found[1]], TEMPLATE.read_text())


def _quoted(option: str) -> str:
    """An option quoted for an #SBATCH line.

    Raises:
        UserError: it holds a double quote, a backslash or an unprintable character.
    """
    if not option.isprintable() or '"' in option or "\\" in option:
        raise UserError(
            f"#SBATCH {shown(option)}: a line of the job's script cannot hold this; leave it out, "
            "or work in another folder"
        )
    return f'"{option}"' if re.search(r"\s|'", option) else option


def submit(job: Job) -> str:
    """Write the script and submit it; returns the job's number.

    Raises:
        UserError: there is no SLURM here, or it refuses the job, with its message.
    """
    write(job)
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(job.script)],
            capture_output=True,
            text=True,
            check=False,
            env=sbatch_options.environment(),
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{job.script}: is written, but there is no sbatch here; submit it where there is"
        ) from error
    if done.returncode:
        reason = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        raise UserError(
            f"{job.script}: SLURM refuses it ({reason}); change what it names, here or with "
            "--sbatch OPTION"
        )
    return done.stdout.strip().split(";")[0]


def write(job: Job) -> None:
    """Write the script."""
    text = render(job)
    write_atomically(job.script, lambda file: file.write(text.encode()))


def python_of(place: Path, executable: str, container: str | None, on_gpu: bool) -> list[str]:
    """The words that start Python in a job: this environment's, or a container's.

    Args:
        place: the folder to run in, bound into a container.
        executable: the environment's Python.
        container: an image for apptainer; None for none.
        on_gpu: whether a container needs the GPU driver.
    """
    if container is None:
        path = Path(executable)
        return [str(path.relative_to(place) if path.is_relative_to(place) else path)]
    seen = ["--bind", str(place), "--pwd", str(place)]
    return ["apptainer", "exec", *(["--nv"] if on_gpu else []), *seen, container, "python"]


def tasks_of(
    base: Path,
    words: Sequence[str],
    sweeps: Sequence[str],
    last: Sequence[str],
    allow: Sequence[str] = (),
) -> list[Task]:
    """The runs of a job: one, or one for every combination of swept values.

    Args:
        base: the run's folder; of a sweep, the folder of the runs' folders.
        words: the experiment and its overrides.
        sweeps: `key=value,value`, each with two values or more.
        last: further overrides of every run.
        allow: of every run.

    Raises:
        UserError: names a malformed sweep.
    """
    choices = []
    for sweep in sweeps:
        key, _, values = sweep.partition("=")
        each = _split(values)
        if len(each) < 2 or not all(each) or not key:
            raise UserError(f"--sweep: must be key=value,value (got {sweep!r}); write two or more")
        choices.append([f"{key}={value}" for value in each])
    if not choices:
        return [Task(base, (*words, *last), tuple(allow))]
    tasks = []
    for chosen in itertools.product(*choices):
        name = re.sub(r"[^\w.=,+-]", "_", ",".join(chosen))
        tasks.append(Task(base / name, (*words, *chosen, *last), tuple(allow)))
    if len({task.run for task in tasks}) < len(tasks):
        raise UserError(
            f"--sweep: two runs would have one folder (got {' '.join(sweeps)}); "
            "name each value once"
        )
    return tasks


def _split(values: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def seconds_of(time: str) -> int:
    """Seconds of a limit in SLURM's format: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        UserError: it has another format.
    """
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    numbers = [*([days] if dash else []), *parts]
    if len(parts) > 3 or not all(each.isdecimal() for each in numbers):
        raise UserError(f"--time: must be as SLURM writes it, such as 24:00:00 (got {time!r})")
    values = [int(each) for each in parts]
    if dash:  # hours first
        hours, minutes, seconds = [*values, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(values) == 1:
        return 60 * values[0]
    hours, minutes, seconds = [0, *values][-3:]
    return (hours * 60 + minutes) * 60 + seconds


def stop_margin(save: float) -> int:
    """Seconds before the limit at which a run is signalled, from the seconds of a save."""
    return math.ceil(max(CLOCK, SAVES * save))
