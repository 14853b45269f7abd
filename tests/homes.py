"""Folders where commands run: experiments/ with a tiny one, and what a command answers there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from diffusion_pl.cli import main

ROOT = Path(__file__).parents[1]


# A network that trains in milliseconds, on images of 8 pixels; what else a run has its test says.
SMALLEST = """defaults: base
network:
  _target_: diffusion_pl.networks.song_unet.SongUNet
  resolution: 8
  model_channels: 8
  channel_mult: [1]
  blocks: 1
  attention: []
objective: {_target_: diffusion_pl.objectives.edm.EDM}
"""


def experiments(folder, text, name="tiny"):
    """Make a folder's experiments/, with base.yaml and one more of this text."""
    (folder / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "base.yaml", folder / "experiments")
    (folder / "experiments" / f"{name}.yaml").write_text(text)


def trained(folder, experiment, *more):
    """A folder with experiments/tiny.yaml, trained to runs/tiny.

    Args:
        folder: an empty one.
        experiment: the YAML's text.
        more: words of further runs, after `train tiny`.
    """
    experiments(folder, experiment)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in ((), *more):
            assert main(["train", "tiny", *words]) == 0
    return folder


def answering(capsys):
    """Run a command and give its exit code, its JSON and stderr."""

    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else None, captured.err

    return call
