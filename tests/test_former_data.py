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
        (f"data={{_target_: {SHARDS}, path: x}}", f"data._target_={SHARDS} & data.path=x"),
        ("trainer={images: 64, warmup: 8}", "trainer.total_images=64 & lr_schedule.warmup=8"),
        ("network={recompute: true}", "network.activation_checkpointing=true"),
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
    before = config.load("today", (made_of, former)).tree
    assert before == config.load("today", (made_of, *today.split(" & "))).tree
    assert before != config.load("today", (made_of,)).tree or SYNTHETIC in former


def test_old_names_are_set_in_the_order_of_the_current_ones(place):
    made = {"_target_": "mine.Syn", "count": 7, "seed": 9}
    words = ["data.dataset._target_=mine.Syn", "data.count=7", "data.seed=9"]
    for order in (words, words[::-1]):
        loaded = config.load("today", order)
        assert loaded.tree["data"]["dataset"] == made
        assert loaded.typed["data.dataset.count"] == "data.count=7"
    whole = {"data.count": 7, "data.dataset": {"_target_": "mine.Syn", "seed": 9}}
    changed = config.replaced(config.load("today"), whole, "PYTHON")
    assert changed.tree["data"]["dataset"] == made


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("data.dataset.count=20", "data.count=30"),
        ("data.workers=1", "data.num_workers=null"),
        ("trainer.warmup=8", "lr_schedule.warmup=8"),
        (f"data._target_={SYNTHETIC}", f"data.dataset._target_={SYNTHETIC}"),
    ],
)
def test_an_override_by_an_old_name_beside_its_new_one_is_refused(place, first, second):
    for words in ((first, second), (second, first)):
        with pytest.raises(config.ConfigError, match="^SET: .*: is the former name of"):
            config.load("today", words)
        changes = dict(config.parse_assignment(word) for word in words)
        with pytest.raises(config.ConfigError, match="^PYTHON: .*: is the former name of"):
            config.replaced(config.load("today"), changes, "PYTHON")
    assert data("today", "data.count=20", "data.count=30")["dataset"]["count"] == 30


@pytest.mark.parametrize(
    "own",
    [
        "data: {workers: 1, num_workers: null}",
        "data: {count: 1, dataset: null}",
        "trainer: {warmup: 8}\nlr_schedule: null",
        "trainer: {warmup: 8}\nlr_schedule: {warmup: null}",
    ],
)
def test_an_old_name_beside_a_null_is_refused(place, own):
    (place / "own.yaml").write_text(f"defaults: today\n{own}\n")
    with pytest.raises(config.ConfigError, match="own.yaml: .*: is the former name of"):
        config.load("own")


def test_a_schedule_of_old_names_is_replaced_by_another(place):
    (place / "old.yaml").write_text("trainer: {warmup: 8, cooldown: 4}\n")
    made = {"_target_": renaming.LATER["lr_schedule"], "warmup": 8, "cooldown": 4}
    assert config.load("old").tree["lr_schedule"] == made
    (place / "own.yaml").write_text("defaults: old\nlr_schedule: {_target_: a.Cosine}\n")
    assert config.load("own").tree["lr_schedule"] == {"_target_": "a.Cosine"}
    # An old name on top of another schedule is an argument of that one.
    assert config.load("own", ("trainer={warmup: 2}",)).tree["lr_schedule"] == {
        "_target_": "a.Cosine",
        "warmup": 2,
    }
    # No schedule stays none.
    (place / "own.yaml").write_text("trainer: {}\nlr_schedule: null\n")
    assert config.load("own").tree["lr_schedule"] is None


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
