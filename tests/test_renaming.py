"""Names that were given up: old experiments, overrides, runs and checkpoints are read by them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import homes
import pytest
import yaml

import diffusion_pl as dp
from diffusion_pl import config
from diffusion_pl.config import renaming
from diffusion_pl.config.annotations import signature
from diffusion_pl.config.registry import PACKAGE
from diffusion_pl.config.targets import locate
from diffusion_pl.interop import weights
from diffusion_pl.training import checkpoint as checkpoints

ROOT = Path(__file__).parents[1]

# What could have been renamed since somebody wrote OLD.
GIVEN_UP = {
    "diffusion_pl.unets": "diffusion_pl.networks.song_unet",
    "diffusion_pl.networks.song_unet.Song": "diffusion_pl.networks.song_unet.SongUNet",
    "diffusion_pl.networks.song_unet.SongUNet:width": "model_channels",
    "diffusion_pl.networks.song_unet.SongUNet:base_width": "width",
    "trainer.total": "trainer.budget",
    "trainer.budget": "trainer.total_images",
    "trainer.scored_every": "evaluation.every",
    "mean": "ema",
}
OLD = """defaults: base
data:
  dataset: {_target_: diffusion_pl.data.synthetic.Synthetic, count: 8, resolution: 8}
  batch_size: 4
network:
  _target_: diffusion_pl.unets.Song
  resolution: 8
  base_width: 8
  channel_mult: [1]
  blocks: 1
  attention: []
objective: {_target_: diffusion_pl.objectives.edm.EDM}
mean: {_target_: diffusion_pl.training.ema.EMA, half_life: "${trainer.budget}"}
sampler: {steps: 2}
features: {name: pixels}
evaluation: {count: 4, batch_size: 4, metrics: [{_target_: diffusion_pl.metrics.fid.Frechet}]}
trainer: {budget: 8, scored_every: 100, checkpoint_every: 4, log_every: 4, devices: 1,
          accelerator: cpu, loggers: []}
"""


@pytest.fixture
def given_up(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    homes.experiments(tmp_path, OLD, "old")
    monkeypatch.setattr(renaming, "RENAMED", GIVEN_UP)
    renaming.warn_once.cache_clear()


def test_every_entry_leads_to_what_is_there():
    known = config.load("quickstart", (), homes.ROOT / "experiments")
    for old, new in renaming.RENAMED.items():
        target, colon, argument = old.partition(":")
        if colon:
            taken = signature(locate(target)).parameters
            assert renaming.argument_now({"_target_": target}, argument) in taken, old
            assert argument not in taken, old
        elif old.startswith(PACKAGE):
            assert renaming.target_now(old).startswith(PACKAGE)
            assert renaming.target_now(old) != old
        else:
            assert renaming.key_now(old) != old
            assert new.partition(".")[0] in known.tree or "." not in new, old


def test_an_old_experiment_is_the_new_one(given_up):
    tree = config.load("old").tree
    assert tree["network"]["_target_"] == "diffusion_pl.networks.song_unet.SongUNet"
    assert tree["network"]["model_channels"] == 8
    assert tree["trainer"]["total_images"] == tree["ema"]["half_life"] == 8
    assert tree["evaluation"]["every"] == 100
    text = yaml.safe_dump(tree)
    assert not [
        name for name in ("Song\n", "width", "budget", "scored_every", "mean") if name in text
    ]


def test_each_old_name_is_said_once(given_up, caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        config.load("old", ("network.base_width=16",))
    said = [record.getMessage() for record in caplog.records]
    assert sorted(said) == [
        "SET: network.base_width is now called network.model_channels; rename it there",
        "experiments/old.yaml: diffusion_pl.unets.Song is now called "
        "diffusion_pl.networks.song_unet.SongUNet; rename it there",
        "experiments/old.yaml: mean is now called ema; rename it there",
        "experiments/old.yaml: network.base_width is now called network.model_channels; "
        "rename it there",
        "experiments/old.yaml: trainer.budget is now called trainer.total_images; rename it there",
        "experiments/old.yaml: trainer.scored_every is now called evaluation.every; "
        "rename it there",
    ]


def test_an_argument_is_renamed_where_the_target_stands_in_the_file_below(given_up):
    Path("experiments/new.yaml").write_text("defaults: old\nnetwork: {base_width: 16}\n")
    assert config.load("new").tree["network"]["model_channels"] == 16
    # Of another target it is another argument.
    own = "network: {_target_: mine.Net, base_width: 16}\n"
    Path("experiments/new.yaml").write_text("defaults: old\n" + own)
    assert config.load("new").tree["network"] == {"_target_": "mine.Net", "base_width": 16}


def test_overrides_and_changes_from_python_take_old_names(given_up):
    words = ("trainer.total=16", "network.base_width=16", "mean.half_life=${trainer.budget}")
    tree = config.load("old", words).tree
    assert (tree["trainer"]["total_images"], tree["network"]["model_channels"]) == (16, 16)
    assert tree["ema"]["half_life"] == 16
    experiment = dp.experiment("old", {"trainer.budget": 32, "network.width": 24})
    assert experiment.config.tree["trainer"]["total_images"] == 32
    assert experiment.config.tree["network"]["model_channels"] == 24


def test_an_old_name_beside_its_new_one_is_refused(given_up):
    Path("experiments/new.yaml").write_text(
        "defaults: old\ntrainer: {budget: 4, total_images: 8}\n"
    )
    with pytest.raises(config.ConfigError, match="new.yaml: trainer.budget: is the former name"):
        config.load("new")
    both = "defaults: old\nnetwork: {base_width: 4, model_channels: 8}\n"
    Path("experiments/new.yaml").write_text(both)
    with pytest.raises(config.ConfigError, match="new.yaml: network.base_width: is the former"):
        config.load("new")


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("network.bas_width=16", "did you mean 'model_channels'"),
        ("trainer.budgets=16", "did you mean 'total_images'"),
        ("meen={}", "did you mean 'ema'"),
        ("meen.half_life=3", "did you mean 'ema'"),
    ],
)
def test_an_unknown_key_near_an_old_name_is_told_the_new_one(given_up, capsys, word, near):
    assert homes.main(["check", "old", word]) == 2
    assert near in capsys.readouterr().err


def test_a_run_of_old_names_opens_and_is_converted(given_up, monkeypatch, capsys):
    assert homes.main(["train", "old"]) == 0
    run = Path("runs/old")
    newest = checkpoints.latest(run / "checkpoints")
    # As a build wrote it that had no other names.
    loaded = checkpoints.load(newest)
    loaded[checkpoints.SECTION]["config"] = backwards(loaded[checkpoints.SECTION]["config"])
    checkpoints.save(loaded, newest)
    kept = run / "config.yaml"
    kept.write_text(yaml.safe_dump(backwards(yaml.safe_load(kept.read_text()))))
    answer = homes.answering(capsys)
    assert homes.main(["train", "old"]) == 0
    assert "is finished" in capsys.readouterr().err
    assert dp.Run(run).sample(1).shape == (1, 3, 8, 8)
    kept.write_text(yaml.safe_dump(backwards(yaml.safe_load(kept.read_text()))))
    capsys.readouterr()
    code, result, err = answer("convert", run)
    assert code == 0, err
    assert result["converted"] == [str(newest), str(kept)]
    assert answer("convert", run)[1]["converted"] == []
    monkeypatch.setattr(renaming, "RENAMED", {})
    assert "base_width" not in json.dumps(checkpoints.described(checkpoints.load(newest), newest))
    assert dp.Run(run).sample(1).shape == (1, 3, 8, 8)
    assert config.load(kept).tree["network"]["model_channels"] == 8


def test_weights_of_old_names_are_imported(given_up, capsys):
    assert homes.main(["train", "old"]) == 0
    assert homes.main(["export", "runs/old", "old.safetensors"]) == 0
    known, state = weights.read(Path("old.safetensors"))
    weights.write(Path("old.safetensors"), state, {**known, "config": backwards(known["config"])})
    assert homes.main(["import", "safetensors", "old.safetensors", "runs/new"]) == 0
    assert config.load("runs/new/config.yaml").tree["network"]["model_channels"] == 8
    assert dp.Run("runs/new").sample(1).shape == (1, 3, 8, 8)


def test_training_starts_from_the_weights_of_a_run_of_old_names(given_up, capsys):
    """Its network is the same one, whose arguments were called otherwise."""
    assert homes.main(["train", "old"]) == 0
    newest = checkpoints.latest(Path("runs/old/checkpoints"))
    loaded = checkpoints.load(newest)
    loaded[checkpoints.SECTION]["config"] = backwards(loaded[checkpoints.SECTION]["config"])
    checkpoints.save(loaded, newest)
    capsys.readouterr()
    code = homes.main(["train", "old", "--from", "runs/old", "--run", "runs/tuned"])
    err = capsys.readouterr().err
    assert code == 0, err
    assert "trained otherwise" not in err


def test_nobody_is_told_to_rename_what_stands_in_a_run(given_up, caplog):
    """`convert` does; a run's files are not written by hand."""
    text = yaml.safe_dump(backwards(config.load("old").tree))
    Path("runs/old").mkdir(parents=True)
    Path("runs/old/config.yaml").write_text(text)
    Path("mine.yaml").write_text(text)
    caplog.set_level(logging.WARNING)
    caplog.clear()
    loaded = [config.load(path).tree for path in ("runs/old/config.yaml", "./mine.yaml")]
    assert loaded[0] == loaded[1]
    files = {record.getMessage().partition(":")[0] for record in caplog.records}
    assert files == {"mine.yaml"}


def backwards(tree):
    """A tree in the names that were given up."""
    network, trainer = dict(tree["network"]), dict(tree["trainer"])
    network["_target_"] = "diffusion_pl.unets.Song"
    network["base_width"] = network.pop("model_channels")
    trainer["budget"] = trainer.pop("total_images")
    return {**tree, "network": network, "trainer": trainer}


def test_no_dotted_path_that_was_given_up_is_used_in_the_package():
    former = [old for old in renaming.RENAMED if old.startswith(PACKAGE)]
    used = [
        f"{path}: {old}"
        for path in (ROOT / PACKAGE).rglob("*.py")
        if path.name != "renaming.py"
        for old in former
        if re.search(rf"{re.escape(old)}\b", path.read_text())
    ]
    assert former and not used
