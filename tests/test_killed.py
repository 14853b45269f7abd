"""A pyramid's run on shards, killed with -9: the same command ends at the same bits."""

from __future__ import annotations

import os
import signal
import time

import pytest
import started
import torch
from homes import experiments

from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History

PYRAMID = """# A tiny pyramid for tests (no published number)
defaults: base
data:
  dataset:
    _target_: diffusion_pl.data.shards.Shards
    path: data/shapes
    made_of:
      _target_: diffusion_pl.data.prepare.Request
      source: {_target_: diffusion_pl.data.sources.base.SourceSpec, path: synthetic, count: 50}
      recipe:
        _target_: diffusion_pl.data.recipe.Recipe
        resolutions: [16, 8]
        shard_images: 10
    resolution: 16
    window: 2
  resolution_weights: {8: 1, 16: 1}
  crop: {_target_: diffusion_pl.data.crops.Crop, size: 12}
  batch_size: 8
  hflip: true
network:
  _target_: diffusion_pl.networks.song_unet.SongUNet
  resolution: 16
  model_channels: 8
  channel_mult: [1, 2]
  blocks: 1
  attention: [8]
  position_frequencies: 2
objective: {_target_: diffusion_pl.objectives.edm.EDM}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20}
sampler:
  _target_: diffusion_pl.samplers.pyramid.PyramidSampler
  base: {_target_: diffusion_pl.samplers.sampler.Sampler, integrate: {_target_: diffusion_pl.samplers.heun.heun, _partial_: true}, schedule: {_target_: diffusion_pl.diffusion.schedules.Rho}, steps: 3}
  levels: [8, 16]
  restart: 1.0
  by: sigma
features: {name: shapes}
evaluation: {every: 240, count: 10, batch_size: 10, grid: 4}
trainer: {total_images: 240, checkpoint_every: 80, log_every: 240, accelerator: cpu, precision: fp32}
"""  # noqa: E501 - YAML


@pytest.fixture
def place(tmp_path):
    experiments(tmp_path, PYRAMID, "pyramid")
    return tmp_path


def begin(place, run, workers):
    """Start the command in a group of its own, with a log beside."""
    words = ["train", "pyramid", "--run", run, f"data.num_workers={workers}"]
    (process,) = started.begin([place], words, log=place / "log")
    return process


def finish(place, run, workers):
    assert started.ended(begin(place, run, workers)) == 0, (place / "log").read_text()


def kill_once(condition, place, run, workers):
    """Start a run and kill it and its workers as soon as a condition holds."""
    process = begin(place, run, workers)
    until = time.monotonic() + 120
    while not condition():
        assert process.is_alive() and time.monotonic() < until, (place / "log").read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def test_a_killed_run_ends_at_the_bits_of_one_that_was_not(place):
    finish(place, "runs/straight", workers=0)
    # With a worker that reads ahead, which dies in the middle of a shard.
    latest = place / "runs" / "killed" / "checkpoints" / "latest"
    kill_once(latest.exists, place, "runs/killed", workers=1)
    stopped = checkpoints.load(checkpoints.latest(latest.parent))["diffusion_pl"]["images"]
    assert 0 < stopped < 240
    finish(place, "runs/killed", workers=1)

    whole, resumed = (
        checkpoints.load(checkpoints.latest(place / "runs" / name / "checkpoints"))
        for name in ("straight", "killed")
    )
    assert whole["global_step"] == resumed["global_step"] == 30
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    first, second = (
        [
            row["value"]
            for row in History(place / "runs" / name / "metrics.jsonl").rows()
            if "name" in row
        ]
        for name in ("straight", "killed")
    )
    assert first == second
