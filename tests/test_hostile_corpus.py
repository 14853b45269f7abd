"""A corpus of hostile and damaged files: each is refused in one line that says where and what.

The cases stand in hostile_*.py. Some hold a program that would write the file `ran`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import hostile_configs  # noqa: F401 - notes its cases
import hostile_models  # noqa: F401
import hostile_shards  # noqa: F401
import hostile_sources  # noqa: F401
import pytest
from homes import experiments
from hostile import CASES

from diffusion_pl.cli import main

ROOT = Path(__file__).parents[1]
TINY = """# A tiny run for tests (no published number)
defaults: base
data:
  dataset: {_target_: diffusion_pl.data.synthetic.Synthetic, count: 40, resolution: 16}
  batch_size: 8
network:
  _target_: diffusion_pl.networks.song_unet.SongUNet
  resolution: 16
  model_channels: 8
  channel_mult: [1, 2]
  blocks: 1
  attention: [8]
objective: {_target_: diffusion_pl.objectives.edm.EDM}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20}
sampler: {steps: 3}
features: {name: shapes}
trainer: {total_images: 32, checkpoint_every: 8, accelerator: cpu, precision: fp32}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with experiments/ and a secret in the environment."""
    experiments(tmp_path, TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "hunter2")
    return tmp_path


def complaint(what, capsys):
    """What a command or a function says of what it refuses."""
    if callable(what):
        with pytest.raises(ValueError, match=".") as told:
            what()
        return str(told.value)
    capsys.readouterr()
    assert main(what) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.endswith("\n")
    return captured.err[:-1]


def test_the_corpus_is_of_a_hundred_cases():
    assert len(CASES) >= 100


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line_and_not_run(name, place, capsys, monkeypatch):
    make, says = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the writers of odd files
        what = make(place)
    if (place / "environment").exists():
        monkeypatch.setenv(*(place / "environment").read_text().split("="))
    text = complaint(what, capsys)
    assert text.isprintable(), text  # one line
    assert "hunter2" not in text
    for word in says:
        assert word in text, text
    assert not (place / "ran").exists()
