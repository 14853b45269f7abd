"""`import edm`: an official network pickle becomes a run like any other."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from published import Fixture

from diffusion_pl.cli import main
from diffusion_pl.commands import runs

ROOT = Path(__file__).parents[1]


def rebuild(meta):
    """Stands for the published function of this name; it is pickled, never called."""
    raise AssertionError(meta)


class Persistent:
    """Pickled as EDM's persistent modules are: a call of the published function with a dict."""

    def __init__(self, name, state):
        self.name, self.state = name, state

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise SystemExit",
            "class_name": self.name,
            "state": self.state,
        }
        return rebuild, (meta,)


def module(name, weights, **more):
    """The object whose state dict is `weights`, its children made from the dots in the keys."""
    children = {}
    own = {key: value for key, value in weights.items() if "." not in key}
    for key, value in weights.items():
        if "." in key:
            children.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = value
    state = {
        "_parameters": own,
        "_buffers": {},
        "_modules": {key: module("Layer", below) for key, below in children.items()},
    }
    return Persistent(name, state | more)


@pytest.fixture
def official(parity, tmp_path, monkeypatch):
    """A small network in the form of the official files, and what it gives."""
    fixture = Fixture(parity / "edm_ddpmpp.npz")
    config = dict(fixture.config)
    names = config.pop("precond"), config.pop("model_type")
    inside = {key.removeprefix("model."): value for key, value in fixture.weights.items()}
    outer = ("img_resolution", "img_channels", "label_dim")
    kept = {key: config[key] for key in outer}
    network = module(names[1], inside, _init_kwargs=config)
    average = module(names[0], {}, _init_kwargs=kept)
    average.state["_modules"]["model"] = network
    # Pickle writes where a function says it lives, and looks that it is there.
    package = types.ModuleType("torch_utils.persistence")
    package._reconstruct_persistent_obj = rebuild
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", package)
    monkeypatch.setattr(rebuild, "__module__", "torch_utils.persistence")
    monkeypatch.setattr(rebuild, "__qualname__", "_reconstruct_persistent_obj")
    (tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": average}))
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "base.yaml", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    return fixture


@torch.no_grad()
def test_an_official_pickle_becomes_a_run(official, capsys):
    assert main(["import", "edm", "edm.pkl", "runs/edm"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kind"] == "edm" and len(result["sha256"]) == 64
    denoiser = runs.open_model(Path("runs/edm")).denoiser
    sigma, augment = official["sigma"], official["augment_labels"]
    denoised = denoiser(official["x"] * sigma.reshape(-1, 1, 1, 1), sigma, augment=augment)
    torch.testing.assert_close(denoised, official["out/denoised_x"], rtol=1e-4, atol=1e-5)
    assert main(["sample", "runs/edm", "--count", "1", "--steps", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["evaluations"] == 3


def test_a_pickle_that_calls_something_else_is_refused(official, capsys):
    Path("evil.pkl").write_bytes(pickle.dumps({"ema": print}))
    assert main(["import", "edm", "evil.pkl", "runs/evil"]) == 2
    error = capsys.readouterr().err
    assert "builtins.print, which is refused" in error and error.count("\n") == 1
    assert not Path("runs/evil").exists()
