"""`launch`: check an experiment, write a SLURM job that trains it and goes on by itself, submit it.

Without lightning, so a login node answers in seconds; see docs/clusters.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from diffusion_pl.addresses import masked
from diffusion_pl.commands import parts, preflight, sbatch, settling, trust
from diffusion_pl.commands.sbatch import Job, Task
from diffusion_pl.config import Config
from diffusion_pl.errors import UserError
from diffusion_pl.names import refuse_name, shown

FAILURES: tuple[type[Exception], ...] = ()


def run(options: argparse.Namespace) -> int:
    """Check, then write and submit; inside a job, check it and make the data."""
    if options.inside:
        return _inside(options)
    job = _job(options)
    job.see_options()
    checked: set[str] = set()
    found = [preflight.look(task, checked=checked) for task in job.tasks]
    for number, each in enumerate(found):
        _tell(each, "" if len(found) == 1 else f"{job.tasks[number].run.name}: ", not number)
    if any(each.faults for each in found):
        return 2
    if all(each.finished for each in found):
        return 0
    job = _timed(job, options.margin, max(each.checkpoint_bytes for each in found))
    for task in job.tasks:
        settling.announce(_read(task), task.run)
    if len(job.tasks) > 1:
        for number, task in enumerate(job.tasks):
            _line(f"task {number}", str(task.run))
    script = shlex.quote(str(job.script))
    if options.dry_run:
        sbatch.write(job)
        _line("script", f"{script}; submit it with: sbatch {script}")
        return 0
    submitted = sbatch.submit(job)
    _line("script", script)
    _line("log", f"tail -F {shlex.quote(str(job.folder))}/slurm-{submitted}*.out")
    _line("try", f"make preempt JOB={submitted}")
    _line("job", submitted)
    return 0


def _inside(options: argparse.Namespace) -> int:
    """The same check in the job itself, against the nodes that it got; then data that is made."""
    run: Path = options.run or parts.RUNS / Path(options.experiment).stem
    task = Task(run, (options.experiment, *options.overrides), tuple(options.allow))
    found = preflight.look(task, job=preflight.variables())
    _tell(found, "", notes=True)
    if found.faults:
        return 2
    # By one process, and not by the first one of every machine.
    trust.data_of(_read(task)).prepare()
    return 0


def _read(task: Task) -> Config:
    return parts.read(task.words[0], task.words[1:], allow=task.allow)


def _job(options: argparse.Namespace) -> Job:
    """What is asked for, with the runs' devices set to those that the job will have."""
    on_gpu = options.tasks is None
    ranks = options.gpus if on_gpu else options.tasks
    for name, value in (("--nodes", options.nodes), ("--gpus or --tasks", ranks)):
        if value < 1:
            raise UserError(f"{name} must be at least 1 (got {value})")
    experiment = parts.read(options.experiment, options.overrides, allow=options.allow)
    base = options.run or parts.RUNS / experiment.name
    if not base.exists():
        refuse_name(base.resolve().name, shown(str(base)), "name another folder with --run")
    words = (options.experiment, *options.overrides)
    place = Path.cwd()
    tasks = sbatch.tasks_of(
        base, words, options.sweep, _devices(options, experiment, ranks), options.allow
    )
    return Job(
        folder=base,
        tasks=[dataclasses.replace(task, data_changed=options.data_changed) for task in tasks],
        nodes=options.nodes,
        ranks=ranks,
        on_gpu=on_gpu,
        cpus=options.cpus or experiment.get("data").get("workers", 0) + 1,
        time=options.time,
        margin=options.margin or 0,
        command=_command(options),
        place=place,
        python=sbatch.python_of(place, sys.executable, options.container, on_gpu),
        options=options.sbatch,
    )


def _devices(options: argparse.Namespace, experiment: Config, ranks: int) -> list[str]:
    """The overrides that give the trainer what the job has.

    Raises:
        UserError: the command line or the experiment wants others.
    """
    devices = {"trainer.nodes": str(options.nodes), "trainer.devices": str(ranks)}
    for word in options.overrides:
        key, _, value = word.partition("=")
        if value != devices.get(key, value):
            raise UserError(
                f"SET: {key}: the job has {devices[key]} (got {value}); remove it, or change "
                "--nodes, --gpus or --tasks"
            )
    overrides = [f"{key}={value}" for key, value in devices.items()]
    kind, other = ("gpu", "--tasks") if options.tasks is None else ("cpu", "--gpus")
    wanted = experiment.get("trainer").get("accelerator", "auto")
    if wanted == "auto":  # or a node that misses its GPUs would train on without
        return [*overrides, f"trainer.accelerator={kind}"]
    if wanted.replace("cuda", "gpu") != kind:
        raise experiment.error(
            "trainer.accelerator",
            f"the job has a {kind} for each process (got {wanted!r}); say {other} for the other",
        )
    return overrides


def _timed(job: Job, margin: int | None, size: int) -> Job:
    """The job with its margin: as asked for, or by what a save of so many bytes takes here."""
    save = preflight.save_seconds(job.folder, size)
    margin = margin or sbatch.margin_of(save)
    limit = sbatch.seconds_of(job.time)
    if limit <= margin + sbatch.CLOCK:
        raise UserError(
            f"--time: the last {margin} s are for stopping, and SLURM may be a minute early, so "
            f"nothing is trained (got {job.time}, {limit} s); ask for more"
        )
    _line("signal", f"USR1 {margin} s before the limit; a save takes about {save:.2g} s here")
    return dataclasses.replace(job, margin=margin)


def _command(options: argparse.Namespace) -> str:
    """The command that makes this job again."""
    words = ["launch", options.experiment, *options.overrides, "--nodes", options.nodes]
    words += ["--gpus", options.gpus] if options.tasks is None else ["--tasks", options.tasks]
    words += ["--time", options.time]
    for name in ("run", "cpus", "margin", "container"):
        if getattr(options, name) is not None:
            words += [f"--{name}", getattr(options, name)]
    words += [word for sweep in options.sweep for word in ("--sweep", sweep)]
    words += ["--data-changed"] if options.data_changed else []
    words += [f"--allow={name}" for name in options.allow]
    words += [f"--sbatch={option}" for option in options.sbatch]
    return shlex.join(["python", "-m", "diffusion_pl", *map(str, words)])


def _tell(found: preflight.Found, where: str, notes: bool) -> None:
    """Print what was found: notes on stdout, a line a fault on stderr."""
    for title, text in found.notes if notes else ():
        _line(title, text)
    for fault in found.faults:
        print(f"error: {shown(masked(where + fault))}", file=sys.stderr)


def _line(title: str, text: str) -> None:
    print(shown(f"{title:8} {text}"), flush=True)
