"""`launch`: check an experiment, and write and submit a SLURM job that trains and requeues itself.

Imports no lightning, so a login node answers in seconds; see docs/clusters.md.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion_pl.addresses import masked
from diffusion_pl.commands import parts, preflight, run_dir, sbatch, trust
from diffusion_pl.commands.options import JobOptions
from diffusion_pl.commands.results import Result, line
from diffusion_pl.commands.sbatch import Job, Task
from diffusion_pl.config import Config
from diffusion_pl.errors import UserError
from diffusion_pl.names import refuse_name, shown


def command(
    experiment: str,
    /,
    *overrides: str,
    dry_run: bool = False,
    inside: bool = False,
    asked: JobOptions = JobOptions(),
) -> Result:
    """Train on a SLURM cluster: check, write the job's script, submit it.

    Example: diffusion_pl launch cifar10_edm --nodes 2 --gpus 8 --time 24:00:00

    Args:
        experiment: a name, or a YAML file anywhere.
        overrides: KEY=VALUE over it, such as optimizer.lr=1e-4.
        dry_run: write the script without submitting it.
        inside: only check, as the script does first.
    """
    words = (experiment, *overrides)
    if inside:
        run = asked.run or parts.RUNS / Path(experiment).stem
        return _inside(Task(run, words, asked.allow))
    job = _job(words, asked)
    job.check_options()
    checked: set[str] = set()
    found = [preflight.check_task(task, checked=checked) for task in job.tasks]
    lines = [line(*note) for note in found[0].notes]
    several = len(found) > 1
    faults = [
        f"{task.run.name}: {fault}" if several else fault
        for task, each in zip(job.tasks, found, strict=True)
        for fault in each.faults
    ]
    if faults:
        return _faults(lines, faults)
    if all(each.finished for each in found):
        return Result({"finished": True}, lines, in_pipes=True)
    size = max(each.checkpoint_bytes for each in found)
    save = preflight.save_seconds(job.folder, size)
    job = _with_margin(job, asked.margin, save)
    told = f"USR1 {job.margin} s before the limit; a save takes about {save:.2g} s here"
    lines.append(line("signal", told))
    for task in job.tasks:
        run_dir.write_config(_read(task), task.run)
    if several:
        lines += [line(f"task {number}", task.run) for number, task in enumerate(job.tasks)]
    return _submitted(job, lines, dry_run)


def _submitted(job: Job, lines: list[str], dry_run: bool) -> Result:
    """Write the script, and submit it unless it is a dry run."""
    script = shlex.quote(str(job.script))
    result = {"script": str(job.script), "runs": [str(task.run) for task in job.tasks]}
    if dry_run:
        sbatch.write(job)
        lines.append(line("script", f"{script}; submit it with: sbatch {script}"))
        return Result(result, lines, in_pipes=True)
    submitted = sbatch.submit(job)
    lines += [
        line("script", script),
        line("log", f"tail -F {shlex.quote(str(job.folder))}/slurm-{submitted}*.out"),
        line("try", f"make preempt JOB={submitted}"),
        line("job", submitted),
    ]
    return Result({**result, "job": submitted}, lines, in_pipes=True)


def _inside(task: Task) -> Result:
    """Check inside the job, against its nodes; then prepare data that is made at the start."""
    found = preflight.check_task(task, job=preflight.variables())
    lines = [line(*note) for note in found.notes]
    if found.faults:
        return _faults(lines, found.faults)
    # By one process, not by one of each node.
    trust.data_of(_read(task)).dataset.prepare()
    return Result({"run": str(task.run)}, lines, in_pipes=True)


def _faults(lines: Sequence[str], faults: Sequence[str]) -> Result:
    """The result with faults, each a line on stderr."""
    errors = [masked(f"error: {fault}") for fault in faults]
    return Result({"faults": faults}, lines, errors, code=2, in_pipes=True)


def _read(task: Task) -> Config:
    return parts.read(task.words[0], task.words[1:], allow=task.allow)


def _job(words: tuple[str, ...], asked: JobOptions) -> Job:
    """The job, with its runs' devices set to those of the job."""
    on_gpu = asked.tasks is None
    for name, value in (("--nodes", asked.nodes), ("--gpus or --tasks", asked.ranks)):
        if value < 1:
            raise UserError(f"{name} must be at least 1 (got {value})")
    experiment = parts.read(words[0], words[1:], allow=asked.allow)
    base = asked.run or parts.RUNS / experiment.name
    if not base.exists():
        refuse_name(base.resolve().name, shown(str(base)), "name another folder with --run")
    place = Path.cwd()
    devices = _devices(words[1:], asked, experiment)
    tasks = sbatch.tasks_of(base, words, asked.sweep, devices, asked.allow)
    return Job(
        folder=base,
        tasks=[dataclasses.replace(task, data_changed=asked.data_changed) for task in tasks],
        nodes=asked.nodes,
        ranks=asked.ranks,
        on_gpu=on_gpu,
        cpus=asked.cpus or experiment.get("data").get("num_workers", 0) + 1,
        time=asked.time,
        margin=asked.margin or 0,
        command=_command(words, asked),
        place=place,
        python=sbatch.python_of(place, sys.executable, asked.container, on_gpu),
        options=asked.sbatch,
    )


def _devices(overrides: Sequence[str], asked: JobOptions, experiment: Config) -> list[str]:
    """The overrides that set the trainer's nodes, devices and accelerator to the job's.

    Raises:
        UserError: the command line or the experiment sets others.
    """
    devices = {"trainer.nodes": str(asked.nodes), "trainer.devices": str(asked.ranks)}
    for word in overrides:
        key, _, value = word.partition("=")
        if value != devices.get(key, value):
            raise UserError(
                f"SET: {key}: the job has {devices[key]} (got {value}); remove it, or change "
                "--nodes, --gpus or --tasks"
            )
    given = [f"{key}={value}" for key, value in devices.items()]
    kind, other = ("gpu", "--tasks") if asked.tasks is None else ("cpu", "--gpus")
    wanted = experiment.get("trainer").get("accelerator", "auto")
    if wanted == "auto":  # so that a node without its GPUs does not train on CPUs
        return [*given, f"trainer.accelerator={kind}"]
    if wanted.replace("cuda", "gpu") != kind:
        raise experiment.error(
            "trainer.accelerator",
            f"the job has a {kind} for each process (got {wanted!r}); use {other} for the other",
        )
    return given


def _with_margin(job: Job, margin: int | None, save: float) -> Job:
    """The job with the given margin, or one from the seconds that a save takes."""
    margin = margin or sbatch.stop_margin(save)
    limit = sbatch.seconds_of(job.time)
    if limit <= margin + sbatch.CLOCK:
        raise UserError(
            f"--time: the last {margin} s are for stopping, and SLURM may be a minute early, so "
            f"nothing would be trained (got {job.time}, {limit} s); ask for more"
        )
    return dataclasses.replace(job, margin=margin)


def _command(words: Sequence[str], asked: JobOptions) -> str:
    """The command that makes this job again."""
    typed: list[object] = ["launch", *words, "--nodes", asked.nodes]
    typed += ["--gpus", asked.gpus] if asked.tasks is None else ["--tasks", asked.tasks]
    typed += ["--time", asked.time]
    for name in ("run", "cpus", "margin", "container"):
        if getattr(asked, name) is not None:
            typed += [f"--{name}", getattr(asked, name)]
    typed += [word for sweep in asked.sweep for word in ("--sweep", sweep)]
    typed += ["--data-changed"] if asked.data_changed else []
    typed += [f"--allow={name}" for name in asked.allow]
    typed += [f"--sbatch={option}" for option in asked.sbatch]
    return shlex.join(["python", "-m", "diffusion_pl", *map(str, typed)])
