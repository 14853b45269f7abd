"""Folders where commands run: experiments/ with a tiny one, and what a command answers there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from diffusion_pl.cli import main

ROOT = Path(__file__).parents[1]


def trained(folder, experiment, *more):
    """A folder with experiments/tiny.yaml, trained to runs/tiny.

    Args:
        folder: an empty one.
        experiment: the YAML's text.
        more: words of further runs, after `train tiny`.
    """
    (folder / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "base.yaml", folder / "experiments")
    (folder / "experiments" / "tiny.yaml").write_text(experiment)
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
