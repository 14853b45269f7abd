"""What is checked before a job waits in a queue, and again first of all inside it; no lightning.

Every fault is a line, `where: what is wrong (what was got); what to do`, and all are told at once.
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

# Room for so many checkpoints must be free: those that are kept and the one that is being written.
CHECKPOINTS = 3
# Bytes that are written to time a save.
PROBE_BYTES = 32 * 1024**2
FLOAT_BYTES = 4
# What Adam keeps of a weight; other optimizers keep less.
ADAM_FLOATS = 2


@dataclass
class PreflightReport:
    """What a pre-flight found.

    Args:
        faults: a line each.
        notes: what is good to know, as (title, text).
        checkpoint_bytes: of the run.
        finished: whether the run is.
    """

    faults: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    checkpoint_bytes: int = 0
    finished: bool = False

    def note(self, title: str, look: Callable[[], str]) -> None:
        """Take down what a look says, or what it finds wrong."""
        try:
            self.notes.append((title, look()))
        except ValueError as error:
            self.faults += [line for line in str(error).splitlines() if line]


def check_task(
    task: Task, *, job: Mapping[str, str] | None = None, checked: set[str] | None = None
) -> PreflightReport:
    """Check a run in seconds: nothing is trained, drawn or decoded, and no run is changed.

    Args:
        task: what is to be trained, and where.
        job: the variables of the job that this process is in; None outside.
        checked: data and measures that earlier runs had and that are not looked at again; grows.
    """
    found = PreflightReport()
    try:
        experiment = parts.read(task.words[0], task.words[1:], allow=task.allow)
        settings: TrainerConfig = config.build(experiment, "trainer")
        data = trust.data_of(experiment)
        trust.check_training(experiment)
        network = parts.meta_network(experiment)
        found.checkpoint_bytes = checkpoint_bytes(experiment, network)
    except ValueError as error:  # what follows would be about another run
        found.faults += str(error).splitlines()
        return found
    if job is not None:
        found.note("job", lambda: _job(settings, job))
    found.note("batch", lambda: _batch(experiment, settings, data))
    same = json.dumps([experiment.get(name) for name in ("data", "features", "evaluation")])
    if checked is None or same not in checked:
        images: dict[int, ImageDataset] = {}
        found.note("data", lambda: _data(data, network, images))
        found.note("compare", lambda: _reference(experiment, data, images))
    if checked is not None:
        checked.add(same)
    found.note("disk", lambda: _disk(task.run, found.checkpoint_bytes))
    if job is not None:
        found.note("lock", lambda: _lock(task.run))
    found.note("run", lambda: _run(found, experiment, settings, data, task.run))
    return found


def _batch(experiment: Config, settings: TrainerConfig, data: DataConfig) -> str:
    assert isinstance(settings.devices, int)
    try:
        size = settings.share_size(data.batch_size, settings.nodes * settings.devices)
    except ValueError as error:
        where = experiment.origin("data.batch_size")
        raise config.ConfigError(f"{where}: {error}") from error
    return (
        f"{data.batch_size:,} images = {settings.nodes} nodes x {settings.devices} x {size}, "
        f"each in {settings.passes(size)} passes"
    )


def _data(data: DataConfig, network: nn.Module, opened: dict[int, ImageDataset]) -> str:
    """See that the data and its index are there; images that lie in shards are opened."""
    source = data.dataset
    if not isinstance(source, Shards):
        source.prepare()
        return f"{type(source).__name__} of {source.resolution} px is there"
    if parts.is_made_later(source):
        return f"{source.path} is made when the job starts; sooner by `make train` or `prepare`"
    source.prepare()  # what is made already is only looked at
    opened.update(open_for(cast(Network, network), data))
    images = opened[source.resolution]
    return f"{images.name}: {len(images):,} images in {len(images.shards):,} shards"


def _reference(experiment: Config, data: DataConfig, opened: dict[int, ImageDataset]) -> str:
    """See that there is something to measure with and to compare with."""
    settings: Evaluation = config.build(experiment, "evaluation")
    extractor = trust.extractor_of(experiment)
    if settings.reference is not None:
        if published.only_images(Path(settings.reference)):
            return f"{settings.reference}: its images are measured when the job starts"
        file = Path(settings.reference)
        if file.suffix == ".pkl":
            reference = statistics.open_reference(file, extractor)
        else:
            reference = published.open_reference(file)
        if settings.metrics:
            reference.check(extractor, data.dataset.resolution)
        return f"{settings.reference}, seen by {extractor.name}"
    if not opened:
        return f"seen by {extractor.name}; the real images' statistics are made where absent"
    images = opened[data.dataset.resolution]
    path = real_images.path_of(parts.REFERENCES, images, extractor, keep=settings.wants_features)
    if path.exists():
        return f"{path}, seen by {extractor.name}"
    return (
        f"seen by {extractor.name}; the statistics of {len(images):,} real images are made when "
        "the job starts"
    )


def _disk(run: Path, size: int) -> str:
    """See that checkpoints fit; a quota below the disk's room is not seen."""
    free = shutil.disk_usage(_existing(run)).free
    if free < CHECKPOINTS * size:
        raise UserError(
            f"{run}: {CHECKPOINTS} checkpoints of {_words(size)} must fit "
            f"(free: {_words(free)}); free some, or name a folder elsewhere with --run"
        )
    return f"{_words(free)} free, a checkpoint takes {_words(size)}"


def _lock(run: Path) -> str:
    """See that nobody else trains here, or wait until that is known."""
    with locks.hold(run / locks.NAME, "looking"):
        return "nobody else writes to the run"


def _run(
    found: PreflightReport, experiment: Config, settings: TrainerConfig, data: DataConfig, run: Path
) -> str:
    """See that the folder is free for this experiment."""
    newest = checkpoints.latest(run / "checkpoints")
    run_dir.check_name(run)
    run_dir.compare(experiment, run, None, newest)
    done = int(newest.stem) if newest else 0
    budget = settings.rounded_images(data.batch_size)
    if newest and not done:
        raise UserError(f"{run}: holds imported weights; name another folder with --run")
    found.finished = done >= budget
    if found.finished:
        return f"{run} is finished: {done:,} images"
    return f"{run}, {'from' if done else 'begins at'} {done:,} of {budget:,} images"


def _job(settings: TrainerConfig, job: Mapping[str, str]) -> str:
    """See that SLURM starts as many tasks as the trainer has devices, and that they see them."""
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
    """Bytes of a checkpoint: the weights, their averages and what Adam keeps of each.

    Args:
        experiment: bound.
        network: without memory.
    """
    floats = sum(each.numel() for each in [*network.parameters(), *network.buffers()])
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    averages = 1 + (len(power_ema.LENGTHS) if config.build(experiment, "ema").posthoc_every else 0)
    return FLOAT_BYTES * (floats * (1 + averages) + trained * ADAM_FLOATS)


def save_seconds(run: Path, size: int) -> float:
    """How long a checkpoint takes to write where the run lies, from a smaller one that is timed.

    Args:
        run: the run's folder.
        size: bytes of the checkpoint.
    """
    written = min(size, PROBE_BYTES)
    # Noise, since some file systems pack what can be packed.
    content = torch.empty(written, dtype=torch.uint8).random_(256)
    with tempfile.TemporaryDirectory(dir=_existing(run), prefix=".probe") as folder:
        started = time.monotonic()
        checkpoints.save({"content": content}, Path(folder) / "probe.ckpt")
        seconds = time.monotonic() - started
    return seconds * size / written


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())


def _words(size: int) -> str:
    """Bytes for people."""
    for unit in ("KiB", "MiB", "GiB"):
        size_in = size / 1024 ** (("KiB", "MiB", "GiB").index(unit) + 1)
        if size_in < 1024 or unit == "GiB":
            return f"{size_in:,.3g} {unit}"
    raise AssertionError


def variables() -> Mapping[str, str]:
    """SLURM's variables of the job that this process is in."""
    return {key: value for key, value in os.environ.items() if key.startswith("SLURM_")}
