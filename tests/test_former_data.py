"""Experiments of before, in which the data set took the settings of its batches, too."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import homes
import pytest

import diffusion_pl as dp
from diffusion_pl import config
from diffusion_pl.cli import main
from diffusion_pl.config import renaming

SYNTHETIC = "diffusion_pl.data.synthetic.Synthetic"
SHARDS = "diffusion_pl.data.shards.Shards"
REST = """network:
  _target_: diffusion_pl.networks.song_unet.SongUNet
  resolution: 16
  model_channels: 8
  channel_mult: [1]
  blocks: 1
  attention: []
objective: {_target_: diffusion_pl.objectives.edm.EDM}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20}
features: {name: pixels}
evaluation: {every: 16, count: 4, batch_size: 4, grid: 4, metrics: []}
sampler: {steps: 2}
trainer: {total_images: 16, checkpoint_every: 8, log_every: 8, accelerator: cpu, devices: 1,
  loggers: []}
"""
FORMER = f"""defaults: base
data:
  _target_: {SYNTHETIC}
  count: 24
  resolution: 16
  shares: {{8: 1, 16: 2}}
  crop: {{_target_: diffusion_pl.data.crops.Crop, size: 12}}
  batch_size: 8
  workers: 1
{REST}"""
TODAY = f"""defaults: base
data:
  dataset: {{_target_: {SYNTHETIC}, count: 24, resolution: 16}}
  resolution_weights: {{8: 1, 16: 2}}
  crop: {{_target_: diffusion_pl.data.crops.Crop, size: 12}}
  batch_size: 8
  num_workers: 1
{REST}"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    homes.experiments(tmp_path, FORMER, "former")
    Path(tmp_path, "experiments/today.yaml").write_text(TODAY)
    monkeypatch.chdir(tmp_path)
    renaming.warn_once.cache_clear()
    return Path("experiments")


def data(name, *words):
    return config.load(name, words).tree["data"]


def test_it_is_the_experiment_of_today_and_a_run_of_it_goes_on(place, capsys):
    assert data("former") == data("today")
    assert main(["train", "former", "--run", "runs/a"]) == 0
    assert main(["train", "today", "--run", "runs/a"]) == 0
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("former", "today"),
    [
        ("data.workers=3", "data.num_workers=3"),
        ("data={workers: 3, count: 9}", "data={num_workers: 3, dataset: {count: 9}}"),
        ("data.shares={16: 1}", "data.resolution_weights={16: 1}"),
        ("data.crop.told=false", "data.crop.return_position=false"),
        ("data.path=x", "data.dataset.path=x"),
        ("data.count=9", "data.dataset.count=9"),
        ("data.made_of.source.count=9", "data.dataset.made_of.source.count=9"),
        (f"data._target_={SYNTHETIC}", f"data.dataset._target_={SYNTHETIC}"),
        ("seed=${data.count}", "seed=${data.dataset.count}"),
    ],
)
def test_overrides_of_before_are_those_of_today(former, today, place):
    made_of = "data.dataset.made_of={_target_: a.b, source: {_target_: a.b}}"
    before, now = (config.load("today", (made_of, word)).tree for word in (former, today))
    assert before == now != config.load("today", (made_of,)).tree or SYNTHETIC in former


def test_another_data_set_takes_no_settings_from_that_below(place):
    """A `_target_` replaces a node, of which the batches were a part and are none today."""
    text = (
        f"defaults: today\ndata: {{_target_: {SHARDS}, path: x, resolution: 16, batch_size: 4}}\n"
    )
    (place / "other.yaml").write_text(text)
    apart = {
        "_target_": renaming.DATA,
        "dataset": {"_target_": SHARDS, "path": "x", "resolution": 16},
        "batch_size": 4,
    }
    assert data("other") == apart
    words = (f"data._target_={SHARDS}", "data.path=x", "data.resolution=16", "data.batch_size=4")
    assert data("today", *words) == apart
    (place / "same.yaml").write_text(
        f"defaults: today\ndata: {{_target_: {SYNTHETIC}, count: 4}}\n"
    )
    assert data("same") == data("today", "data.dataset.count=4")
    kept = data("today", f"data.dataset._target_={SHARDS}", "data.dataset.path=x")
    assert kept["num_workers"] == 1 and kept["dataset"] == {"_target_": SHARDS, "path": "x"}


def test_a_run_goes_on_where_a_setting_is_left_at_its_default(place, capsys):
    assert main(["train", "today", "--run", "runs/a", "data.crop=null", "data.hflip=false"]) == 0
    text = TODAY.replace("  crop: {_target_: diffusion_pl.data.crops.Crop, size: 12}\n", "")
    (place / "today.yaml").write_text(text)
    assert main(["train", "today", "--run", "runs/a"]) == 0
    assert main(["train", "today", "--run", "runs/a", "data.hflip=true"]) == 2
    assert "data.hflip: false -> true" in capsys.readouterr().err


def test_what_is_new_is_said_once(place, caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        config.load("former", ("data.count=8",))
    assert sorted(record.getMessage() for record in caplog.records) == [
        "SET: data.count is now called data.dataset.count; rename it there",
        *(
            f"experiments/former.yaml: data.{old} is now called data.{new}; rename it there"
            for old, new in (
                ("_target_", "dataset._target_"),
                ("shares", "resolution_weights"),
                ("workers", "num_workers"),
            )
        ),
    ]


@dataclasses.dataclass(frozen=True)
class Own:
    """A data set as one wrote it before, whose arguments nobody else knows."""

    tiles: int
    batch_size: int = 4
    resolution: int = 16
    channels: int = 3

    def prepare(self):
        """Nothing to do."""

    def open(self, resolution=None):
        """Nothing to open."""


def test_a_data_set_of_ones_own_is_taken_apart_too(place):
    made = dp.Experiment(base="today", data=Own(3)).config.tree["data"]
    assert made == {
        "_target_": renaming.DATA,
        "dataset": {
            "_target_": "test_former_data.Own",
            "tiles": 3,
            "resolution": 16,
            "channels": 3,
        },
        "batch_size": 4,
    }
