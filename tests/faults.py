"""Faults that a run does to itself at a pass or a reading of its own choosing.

FAULT in the environment is `kind:number`: at the pass of that number, of steps and evaluations
alike, the network does it; kinds that begin with `read-` are done by a reading process at its
reading of that number, those that begin with `open-` when the data is opened, `save-full` and
`save-kill` where a file grows beyond that many bytes.
FAULT_RANK is whom it befalls, of ranks that share an environment.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.signals import MARKER, RESUMABLE
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History

# A run of which every random stream there is goes into the weights.
RUN = """# Several resolutions, dropout, labels, flips, augmentation (no published number)
defaults: base
data:
  dataset: {_target_: faults.Data, count: 40, resolution: 16}
  batch_size: 8
  resolution_weights: {8: 1, 16: 2}
  hflip: true
network:
  _target_: faults.Network
  resolution: 16
  classes: 8
  model_channels: 8
  channel_mult: [1, 2]
  blocks: 1
  attention: [8]
  dropout: 0.1
  augment: 9
augment: {_target_: diffusion_pl.data.augment.NonLeaky}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20, posthoc_every: 32}
sampler: {steps: 3, schedule: {sigma_min: 0.05, sigma_max: 20.0}}
features: {name: shapes}
evaluation: {every: 48, count: 40, batch_size: 16, grid: 9}
lr_schedule: {warmup: 40}
trainer:
  total_images: 96
  checkpoint_every: 32
  log_every: 24
  dropout: {label: 0.2}
  grad_clip: 1.0
  accelerator: cpu
  precision: fp32
  loggers: []
  start_timeout: 25
  timeout: 15
  watchdog: 15
  read_timeout: 20
objective: OBJECTIVE
"""
EDM = "{_target_: diffusion_pl.objectives.edm.EDM}"
SIGNALS = ("TERM", "USR1", "INT", "HUP")
FILE_BYTES = 60_000  # more than the history, less than a checkpoint
MARGIN = 10.0  # seconds from the signal to the end of a job's time


class Network(SongUNet):
    """Does the fault of this process at the pass that it names."""

    calls = 0

    def forward(self, x, c_noise, **condition):
        Network.calls += 1
        kind, at = mine()
        output = super().forward(x, c_noise, **condition)
        if at == str(Network.calls) and "-" not in kind:
            if kind == "nan":
                return output * float("nan")
            do(kind)
        return output


@dataclass
class Store:
    """Images whose reading process does the fault of this process at the reading that it names."""

    images: torch.Tensor
    readings: int = 0

    @property
    def shape(self):
        return tuple(self.images.shape)

    def read(self, indices):
        kind, at = mine()
        if multiprocessing.parent_process() is not None and kind.startswith("read-"):
            self.readings += 1
            if at == str(self.readings):
                do(kind.removeprefix("read-"))
        return self.images[indices]


@dataclass(frozen=True)
class Data(Synthetic):
    """The synthetic images in such a store."""

    stores: dict = field(default_factory=dict, compare=False)

    def open(self, resolution=None):
        kind, _ = mine()
        if kind.startswith("open-"):
            do(kind.removeprefix("open-"))
        images = super().open(resolution)
        object.__setattr__(images, "store", Store(images.store))
        return images


def mine():
    """This process's fault: its kind and its number."""
    rank = os.environ.get("LOCAL_RANK", "0")
    if os.environ.get("FAULT_RANK", rank) != rank:
        return "", ""
    kind, _, at = os.environ.get("FAULT", "").partition(":")
    return kind, at


def do(kind):
    """Do a fault to this process."""
    if kind == "raise":
        raise RuntimeError("a fault of the test")
    if kind == "hang":
        time.sleep(3600)
    if kind == "node":
        os.killpg(0, signal.SIGKILL)
    if kind == "limit":
        end = threading.Timer(MARGIN, os.kill, (os.getpid(), signal.SIGKILL))
        end.daemon = True
        end.start()
        kind = "USR1"
    os.kill(os.getpid(), getattr(signal, f"SIG{kind}"))


@dataclass(frozen=True)
class Kind:
    """A kind of fault and what must come of it.

    Args:
        fault: what FAULT names.
        ranks: whom it befalls: "one" or "all".
        codes: exit codes that a rank may end with.
        marked: whether the run must wait to go on by its marker.
        words: overrides of the run.
        damage: whether the newest checkpoint is damaged before the run goes on.
    """

    fault: str
    ranks: str = "one"
    codes: tuple = (1, -9)
    marked: bool = False
    words: tuple = ()
    damage: bool = False


STOPPED = {"codes": (0, RESUMABLE), "marked": True}
READ = {"words": ("data.num_workers=1",)}
KINDS = {
    **{f"{name} to all ranks": Kind(name, "all", **STOPPED) for name in SIGNALS},
    **{f"{name} to one rank": Kind(name, "one", **STOPPED) for name in SIGNALS},
    "TERM before the first step": Kind("open-TERM", codes=(1, RESUMABLE), marked=True),
    "a rank is killed": Kind("KILL"),
    "all ranks are killed": Kind("KILL", "all"),
    "a node is lost, its rank with all it started": Kind("node", **READ),
    "the job's time ends, after a signal": Kind("limit", "all", **STOPPED),
    # The others end; who started the stopped one ends it, see test_watchdog.py.
    "a rank is stopped": Kind("STOP", codes=(1, -9, None)),
    "a rank hangs": Kind("hang"),
    "an exception on one rank": Kind("raise"),
    "a loss that is not a number": Kind("nan"),
    "a reading process is killed": Kind("read-KILL", **READ),
    "a reading process is stopped": Kind("read-STOP", **READ),
    "an image that cannot be read": Kind("read-raise", **READ),
    "killed while it saves": Kind("save-kill", "zero", codes=(1, -signal.SIGXFSZ)),
    "the disk is full": Kind("save-full", "zero", codes=(1, 2)),
    "the newest checkpoint is damaged": Kind("TERM", "all", damage=True, **STOPPED),
}


def passes(ranks):
    """Passes that a process of the run makes: steps, evaluations, what an evaluation costs."""
    return 2 + 12 + 2 * 15 if ranks == 1 else 12


def at(kind, ranks, source):
    """A number at which a fault of a kind happens, for FAULT."""
    if kind.fault.startswith("save-"):
        return FILE_BYTES
    if kind.damage:  # once there is a checkpoint before the newest
        return source.randint(9, passes(ranks))
    return source.randint(2, 10 if kind.fault.startswith("read-") else passes(ranks))


def befallen(kind, ranks, source):
    """The ranks that a fault of a kind befalls."""
    if kind.ranks == "zero":  # who saves
        return [0]
    return list(range(ranks)) if kind.ranks == "all" else [source.randrange(ranks)]


def write(place, objective=EDM):
    """The experiment, as `experiments/tried.yaml` beside a copy of base.yaml."""
    (place / "experiments" / "tried.yaml").write_text(RUN.replace("OBJECTIVE", objective))


def spoil(path: Path, source: random.Random):
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    path.write_bytes(content)


def newest(place, run):
    """The run's newest checkpoint."""
    return checkpoints.latest(place / "runs" / run / "checkpoints")


def marked(place, run):
    """Whether a run waits to go on."""
    return (place / "runs" / run / MARKER).exists()


def left(place, run):
    """What a run leaves: weights, averages, optimizer, history, averages to be combined.

    Not times, and not Lightning's count of its own loops, which begin anew with each process.
    """
    folder = place / "runs" / run
    loaded = checkpoints.load(newest(place, run))
    loaded = {key: value for key, value in loaded.items() if key not in ("epoch", "loops")}
    timed = ("seconds", "images_per_second", "commit", "time", "data_wait", "memory_gb")
    history = [
        {key: value for key, value in row.items() if key not in timed}
        for row in History(folder / "metrics.jsonl").rows()
    ]
    snapshots = {path.name: path.read_bytes() for path in (folder / "posthoc").iterdir()}
    return loaded, history, snapshots


def assert_equal(one, other, where=""):
    """That two of what `left` gives are equal to the last bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}[{number}]")
    else:
        assert one == other or one != one, (where, one, other)
