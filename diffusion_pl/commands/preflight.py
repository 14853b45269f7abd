"""Checks before a job is submitted, and again at its start; imports no lightning.

Every fault is a line, `where: what is wrong (what was got); what to do`, and all are reported.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import nn

from diffusion_pl import config, locks
from diffusion_pl.commands import parts, run_dir, trust
from diffusion_pl.commands.sbatch import Task
from diffusion_pl.config import Config
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.shards import Shards
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation
from diffusion_pl.images import ImageDataset
from diffusion_pl.interop import statistics
from diffusion_pl.metrics import published, real_images
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import power_ema
from diffusion_pl.training.opening import Network, open_for
from diffusion_pl.training.settings import TrainerConfig

CHECKPOINTS = 3  # that must fit on the disk: those kept and the one being written
PROBE_BYTES = 32 * 1024**2  # written to time a save
FLOAT_BYTES = 4
ADAM_FLOATS = 2  # of each weight; other optimizers have fewer


@dataclass
class PreflightReport:
    """The result of the checks.

    Args:
        faults: a line each.
        notes: (title, text) pairs.
        checkpoint_bytes: size of a checkpoint of the run.
        finished: whether the run is.
    """

    faults: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    checkpoint_bytes: int = 0
    finished: bool = False

    def add(self, title: str, check: Callable[[], str]) -> None:
        """Run a check; keep its text as a note, or the lines of its error as faults."""
        try:
            self.notes.append((title, check()))
        except ValueError as error:
            self.faults += [line for line in str(error).splitlines() if line]


def check_task(
    task: Task, *, job: Mapping[str, str] | None = None, checked: set[str] | None = None
) -> PreflightReport:
    """Check a run in seconds; nothing is trained, sampled or decoded, and no run is changed.

    Args:
        task: the run.
        job: SLURM's variables of the job that this process runs in; None outside.
        checked: keys of data and evaluations that were checked for earlier runs; updated in place.
    """
    report = PreflightReport()
    try:
        experiment = parts.read(task.words[0], task.words[1:], allow=task.allow)
        settings: TrainerConfig = config.build(experiment, "trainer")
        data = trust.data_of(experiment)
        trust.check_training(experiment)
        network = parts.meta_network(experiment)
        report.checkpoint_bytes = checkpoint_bytes(experiment, network)
    except ValueError as error:  # the other checks need these parts
        report.faults += str(error).splitlines()
        return report
    if job is not None:
        report.add("job", lambda: _job(settings, job))
    report.add("batch", lambda: _batch(experiment, settings, data))
    same = json.dumps([experiment.get(name) for name in ("data", "features", "evaluation")])
    if checked is None or same not in checked:
        images: dict[int, ImageDataset] = {}
        report.add("data", lambda: _data(data, network, images))
        report.add("compare", lambda: _reference(experiment, data, images))
    if checked is not None:
        checked.add(same)
    report.add("disk", lambda: _disk(task.run, report.checkpoint_bytes))
    if job is not None:
        report.add("lock", lambda: _lock(task.run))
    report.add("run", lambda: _run(report, experiment, settings, data, task.run))
    return report


def _batch(experiment: Config, settings: TrainerConfig, data: DataConfig) -> str:
    assert isinstance(settings.devices, int)
    size = parts.device_batch(experiment, settings, settings.nodes * settings.devices)
    return (
        f"{data.batch_size:,} images = {settings.nodes} nodes x {settings.devices} x {size}, "
        f"each in {settings.micro_batches(size)} micro-batches"
    )


def _data(data: DataConfig, network: nn.Module, opened: dict[int, ImageDataset]) -> str:
    """Check that the data is there; opens the images of shards."""
    source = data.dataset
    if not isinstance(source, Shards):
        source.prepare()
        return f"{type(source).__name__} of {source.resolution} px is there"
    if parts.is_made_later(source):
        return f"{source.path} is prepared when the job starts, or before by `prepare`"
    source.prepare()  # what is made already is only looked at
    opened.update(open_for(cast(Network, network), data))
    images = opened[source.resolution]
    return f"{images.name}: {len(images):,} images in {len(images.shards):,} shards"


def _reference(experiment: Config, data: DataConfig, opened: dict[int, ImageDataset]) -> str:
    """Check the feature extractor and the reference statistics."""
    settings: Evaluation = config.build(experiment, "evaluation")
    extractor = trust.extractor_of(experiment)
    if settings.reference is not None:
        if published.only_images(Path(settings.reference)):
            return f"{settings.reference}: its statistics are computed when the job starts"
        file = Path(settings.reference)
        if file.suffix == ".pkl":
            reference = statistics.open_reference(file, extractor)
        else:
            reference = published.open_reference(file)
        if settings.metrics:
            reference.check(extractor, data.dataset.resolution)
        return f"{settings.reference}, features of {extractor.name}"
    if not opened:
        return f"features of {extractor.name}; missing statistics of real images are computed"
    images = opened[data.dataset.resolution]
    path = real_images.path_of(parts.REFERENCES, images, extractor, keep=settings.wants_features)
    if path.exists():
        return f"{path}, features of {extractor.name}"
    return (
        f"features of {extractor.name}; the statistics of {len(images):,} real images are "
        "computed when the job starts"
    )


def _disk(run: Path, size: int) -> str:
    """Check that checkpoints fit on the disk; quotas are not known."""
    free = shutil.disk_usage(_existing(run)).free
    if free < CHECKPOINTS * size:
        raise UserError(
            f"{run}: {CHECKPOINTS} checkpoints of {_format_bytes(size)} must fit "
            f"(free: {_format_bytes(free)}); free some, or name a folder elsewhere with --run"
        )
    return f"{_format_bytes(free)} free, a checkpoint takes {_format_bytes(size)}"


def _lock(run: Path) -> str:
    """Check that no other process writes to the run, waiting for its heartbeat if need be."""
    with locks.hold(run / locks.NAME, "looking"):
        return "no other process writes to the run"


def _run(
    report: PreflightReport,
    experiment: Config,
    settings: TrainerConfig,
    data: DataConfig,
    run: Path,
) -> str:
    """Check that the folder is empty or holds this experiment's run."""
    newest = checkpoints.latest(run / "checkpoints")
    run_dir.check_name(run)
    run_dir.compare(experiment, run, None, newest)
    done = int(newest.stem) if newest else 0
    budget = settings.rounded_images(data.batch_size)
    if newest and not done:
        raise UserError(f"{run}: holds imported weights; name another folder with --run")
    report.finished = done >= budget
    if report.finished:
        return f"{run} is finished: {done:,} images"
    return f"{run}, {'from' if done else 'begins at'} {done:,} of {budget:,} images"


def _job(settings: TrainerConfig, job: Mapping[str, str]) -> str:
    """Check that SLURM starts as many tasks as the trainer has devices, and that they see GPUs."""
    faults = []
    for option, variable, key, wanted in (
        ("nodes", "SLURM_NNODES", "trainer.nodes", settings.nodes),
        ("ntasks-per-node", "SLURM_NTASKS_PER_NODE", "trainer.devices", settings.devices),
    ):
        got = job.get(variable, "none")
        if got != str(wanted):
            faults.append(
                f"job: #SBATCH --{option} and {key}={wanted} differ (got {got}); "
                f"make it: #SBATCH --{option}={wanted}"
            )
    seen = torch.cuda.device_count()
    if settings.accelerator in ("gpu", "cuda") and seen < int(settings.devices):
        faults.append(
            f"job: the tasks of a node need {settings.devices} GPUs (this one shows {seen}); "
            f"make it: #SBATCH --gpus-per-node={settings.devices}, or train on CPUs with --tasks"
        )
    if faults:
        raise UserError("\n".join(faults))
    return f"{job.get('SLURM_JOB_NODELIST', '')}: {settings.nodes} nodes x {settings.devices} tasks"


def checkpoint_bytes(experiment: Config, network: nn.Module) -> int:
    """Bytes of a checkpoint: the weights, their averages and Adam's moments.

    Args:
        experiment: bound.
        network: on the meta device.
    """
    floats = sum(each.numel() for each in [*network.parameters(), *network.buffers()])
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    averages = 1 + (len(power_ema.LENGTHS) if config.build(experiment, "ema").posthoc_every else 0)
    return FLOAT_BYTES * (floats * (1 + averages) + trained * ADAM_FLOATS)


def save_seconds(run: Path, size: int) -> float:
    """Seconds to write a checkpoint of `size` bytes to the run's folder, from a smaller one."""
    written = min(size, PROBE_BYTES)
    # Random bytes, since some file systems compress.
    content = torch.empty(written, dtype=torch.uint8).random_(256)
    with tempfile.TemporaryDirectory(dir=_existing(run), prefix=".probe") as folder:
        started = time.monotonic()
        checkpoints.save({"content": content}, Path(folder) / "probe.ckpt")
        seconds = time.monotonic() - started
    return seconds * size / written


def _existing(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())


def _format_bytes(size: int) -> str:
    power = min(3, max(1, (size.bit_length() - 1) // 10))
    return f"{size / 1024**power:,.3g} {('KiB', 'MiB', 'GiB')[power - 1]}"


def variables() -> Mapping[str, str]:
    """SLURM's variables in this process's environment."""
    return {key: value for key, value in os.environ.items() if key.startswith("SLURM_")}
