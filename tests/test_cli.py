"""The commands as a user types them, on experiments small enough for seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from homes import experiments
from PIL import Image

import diffusion_pl
from diffusion_pl import config
from diffusion_pl.cli import main
from diffusion_pl.commands import hints
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History

ROOT = Path(__file__).parents[1]
TINY = """# A tiny run for tests (no published number)
defaults: base
data:
  dataset: {_target_: diffusion_pl.data.synthetic.Synthetic, count: 40, resolution: 16}
  batch_size: 8
network:
  _target_: diffusion_pl.networks.song_unet.SongUNet
  resolution: 16
  classes: 8
  model_channels: 8
  channel_mult: [1, 2]
  blocks: 1
  attention: [8]
objective: {_target_: diffusion_pl.objectives.edm.EDM}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20}
sampler: {steps: 3}
features: {name: shapes}
evaluation: {every: 16, count: 20, batch_size: 10, grid: 9}
trainer: {total_images: 32, checkpoint_every: 8, log_every: 8, accelerator: cpu, precision: fp32,
  dropout: {label: 0.1}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with experiments/, where commands run."""
    experiments(tmp_path, TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(place, capsys):
    """Run a command and give its exit code, stdout and stderr."""

    def call(*words):
        code = main(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def trained(run):
    code, out, _ = run("train", "tiny")
    assert code == 0
    return out


def test_training_ends_with_the_folder_the_numbers_and_what_to_type_next(trained, run):
    lines = trained.splitlines()
    assert lines[0].split() == ["run", "runs/tiny", "(32", "images)"]
    assert [line.split()[1] for line in lines[1:4]] == [
        "fd@20/synthetic-16/shapes",
        "cs@20/synthetic-16/shapes",
        "cs_std@20/synthetic-16/shapes",
    ]
    assert lines[-1] == f"next     {hints.command('sample', 'runs/tiny', '--count', 64)}"
    assert Path("runs/tiny/samples/000000000032.png").exists()
    assert list(Path("runs/tiny/tensorboard").glob("events*"))


def test_the_same_command_again_says_that_the_run_is_finished(trained, run):
    before = Path("runs/tiny/checkpoints/000000000032.ckpt").stat().st_mtime_ns
    code, out, err = run("train", "tiny")
    assert (code, out) == (0, trained)
    assert "runs/tiny is finished: 32 images" in err
    assert Path("runs/tiny/checkpoints/000000000032.ckpt").stat().st_mtime_ns == before


def test_the_same_command_goes_on_with_an_interrupted_run(trained, run):
    whole = checkpoints.load(Path("runs/tiny/checkpoints/000000000032.ckpt"))
    Path("runs/tiny/checkpoints/000000000032.ckpt").unlink()
    checkpoints.point_to(Path("runs/tiny/checkpoints/000000000024.ckpt"))
    code, _, err = run("train", "tiny")
    assert code == 0
    assert "going on from 24 of 32 images" in err
    again = checkpoints.load(Path("runs/tiny/checkpoints/000000000032.ckpt"))
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, again["state_dict"][key]), key
    losses = [row for row in History(Path("runs/tiny/metrics.jsonl")).rows() if "loss" in row]
    assert [row["images"] for row in losses] == [8, 16, 24, 32]


def test_a_changed_config_is_refused_with_the_differing_keys(trained, run):
    code, _, err = run("train", "tiny", "optimizer.lr=1e-4")
    assert code == 2
    assert "runs/tiny was begun with another config" in err
    assert "optimizer.lr: 0.001 -> 0.0001" in err
    assert run("train", "tiny", "optimizer.lr=1e-4", "--run", "runs/other")[0] == 0


def test_where_a_run_computes_may_change_and_is_noted(trained, run):
    words = ("trainer.device_batch_size=4", "trainer.loggers=[]", "data.num_workers=1")
    code, _, err = run("train", "tiny", *words)
    assert code == 0 and "runs/tiny is finished" in err
    kept = Path("runs/tiny/config.yaml").read_text()
    assert "device_batch_size: 4" in kept and "loggers: []" in kept and "num_workers: 1" in kept


def test_sampling_writes_images_a_grid_and_arrays(trained, run):
    code, out, _ = run("sample", "runs/tiny", "--count", "5", "--seed", "1", "--batch-size", "2")
    assert code == 0
    result = json.loads(out)
    folder = Path(result["folder"])
    assert result["evaluations"] == 5
    assert result["images"] == str(folder / "images")
    assert sorted(file.name for file in Path(result["images"]).iterdir()) == [
        f"{index:06d}.png" for index in range(5)
    ]
    images = np.load(folder / "images.npz")["images"]
    assert images.shape == (5, 16, 16, 3)
    for index in range(5):
        with Image.open(folder / "images" / f"{index:06d}.png") as file:
            assert np.array_equal(np.asarray(file), images[index])
    words = ("--count", "1", "--first", "3", "--seed", "1", "--out", "other")
    assert run("sample", "runs/tiny", *words)[0] == 0
    assert np.array_equal(np.load("other/images.npz")["images"][0], images[3])


@pytest.mark.parametrize(
    ("words", "evaluations"),
    [
        (["--sampler", "heun", "--steps", "4"], 7),
        (["--sampler", "euler", "--steps", "4"], 4),
        (["--sampler", "ddim", "--steps", "3"], 3),
        (["--sampler", "ancestral", "--steps", "4"], 4),
        (["--steps", "2"], 3),
        (
            [
                "--set",
                "sampler.integrate._target_=diffusion_pl.samplers.euler.euler",
                "--set",
                "sampler.integrate._partial_=true",
            ],
            3,
        ),
        (["--weights", "denoiser", "--label", "2", "--guidance", "2"], 10),
    ],
)
def test_the_command_line_chooses_how_to_draw(trained, run, words, evaluations):
    code, out, err = run("sample", "runs/tiny", "--count", "2", *words)
    assert code == 0, err
    assert json.loads(out)["evaluations"] == evaluations


def test_evaluating_a_run_prints_the_numbers_of_its_training(trained, run):
    code, out, _ = run("evaluate", "runs/tiny")
    assert code == 0
    result = json.loads(out)
    rows = [row for row in History(Path("runs/tiny/metrics.jsonl")).rows() if "name" in row]
    last = {row["name"]: row["value"] for row in rows if row["images"] == 32}
    assert result["images"] == 32
    assert {row["name"]: row["value"] for row in result["measures"]} == pytest.approx(last)
    fewer = json.loads(run("evaluate", "runs/tiny", "--count", "10")[1])
    assert fewer["measures"][0]["name"] == "fd@10/synthetic-16/shapes"


def test_check_says_what_an_experiment_means(run):
    code, out, _ = run("check", "tiny", "data.batch_size=16", "trainer.device_batch_size=4")
    assert code == 0
    assert "SongUNet, " in out
    assert "16 images = 1 nodes x 1 devices x 16 images, each in 4 micro-batches; fp32" in out
    assert "32 images = 2 steps" in out
    assert "sampling 80 to 0.002 in 3 steps" in out


def test_check_prints_what_an_experiment_resolves_to_and_train_takes_it(run, place):
    code, out, _ = run("check", "--resolved", "tiny", "optimizer.lr=5e-3")
    assert code == 0
    (place / "whole.yaml").write_text(out)
    assert "defaults" not in config.load("whole.yaml").tree
    assert config.load("whole.yaml").tree == config.load("tiny", ["optimizer.lr=5e-3"]).tree
    assert run("check", "whole.yaml")[0] == 0
    code, both, _ = run("check", "--resolved", "tiny", "whole.yaml")
    assert code == 0 and both.count("\n---\n") == 1
    assert run("check", "--resolved", "tiny", "optimizer.rl=1")[0] == 2


def test_the_version_is_told_without_torch(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffusion_pl {diffusion_pl.__version__}\n"


def test_check_says_which_sizes_the_steps_take(run):
    words = [
        "data.resolution_weights={8: 1, 16: 3}",
        "trainer.device_batch_size=2",
        "data.batch_size=8",
    ]
    crop = "data.crop={_target_: diffusion_pl.data.crops.Crop, size: 8}"
    whole, cut = (run("check", "tiny", *words, *more)[1] for more in ((), (crop,)))
    assert (
        "8 px in 25% of the steps (1 micro-batches), 16 px in 75% of the steps (4 micro-batches)"
        in whole
    )
    assert "16 px in 75% of the steps (1 micro-batches, crops of 8)" in cut


def test_what_is_told_in_lines_is_json_where_it_is_asked_for(trained, run):
    finished = json.loads(run("train", "tiny", "--json")[1])
    assert (finished["run"], finished["images"]) == ("runs/tiny", 32)
    assert finished["measures"][0]["name"] == "fd@20/synthetic-16/shapes"
    meant = json.loads(run("check", "tiny", "--json", "data.batch_size=16")[1])
    assert meant["tiny"]["budget"].startswith("32 images = 2 steps")
    listed = json.loads(run("experiments", "--json")[1])
    assert listed == {"tiny": "A tiny run for tests (no published number)"}


def test_a_terminal_shows_lines_of_any_result_unless_json_is_asked_for(trained, run, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sound = run("verify", "runs/tiny")[1].splitlines()
    assert sound[0] == "path     runs/tiny" and not any("{" in line for line in sound)
    assert json.loads(run("verify", "runs/tiny", "--json")[1])["path"] == "runs/tiny"


def test_of_several_experiments_those_that_fit_are_told(run):
    code, out, err = run("check", "tiny", "tinny")
    assert code == 2 and out.startswith("tiny:\nnetwork ") and "tinny" in err
    assert err.startswith("error: ") and "Traceback" not in err


def test_experiments_are_listed_with_their_first_line(run):
    code, out, _ = run("experiments")
    assert (code, out) == (0, "tiny  A tiny run for tests (no published number)\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "tinny"], "tiny"),
        (["check", "tiny", "objective.P_sdt=1"], "did you mean 'P_std'?"),
        (["check", "tiny", "trainer.total_images=many"], "trainer.total_images"),
        (["check", "tiny", "optimzer.lr=1"], "optimizer"),
        (["check", "tiny", "data.batch_size=7", "trainer.devices=2"], "use 6 or 8"),
        (["check", "tiny", "network.resolution=15"], "must be multiples of 2"),
        (["check", "tiny", "data.dataset.resolution=17"], "must be multiples of 2"),
        (["check", "tiny", "sampler.steps=0"], "at least 1 step"),
        (["check", "tiny", "sampler.schedule.sigma_min=90"], "0 < sigma_min < sigma_max"),
        (
            [
                "check", "tiny", "objective._target_=diffusion_pl.objectives.ddpm.DDPM",
            ],
            "the network knows 157.407 to 0.0100005",
        ),
        (["train", "tiny", "data.dataset._target_=diffusion_pl.data.cifar10.CIFAR10",
          "data.dataset.path=nowhere", "network.resolution=32"], "nowhere"),
        (["train", "tiny", "features.name=inception", "features.weights=no.pth"], "no.pth"),
        (["train", "tiny", "trainer.loggers=[wandb]"], "wandb is not installed"),
        (["sample", "runs/none"], "there is no such run"),
        (["evaluate", "runs/none"], "there is no such run"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(run, words, message):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--label", "8"], "label 8 is not one of the model's classes (0 to 7)"),
        (["--sampler", "huen"], "there is no sampler 'huen'"),
        (["--count", "0"], "--count must be positive"),
        (["--first=-1"], "--first at least 0 (got 64, -1)"),
        (["--steps", "0"], "a sampler needs at least 1 step (got 0)"),
        (["--sampler", "heun", "--steps", "0"], "a sampler needs at least 1 step (got 0)"),
        (["--set", "sampler.stesp=3"], "did you mean 'steps'?"),
        (["--set", "objective._target_=os.system"], "outside the trusted packages"),
    ],
)
def test_bad_requests_of_a_run_are_one_clear_line(trained, run, words, message):
    code, out, err = run("sample", "runs/tiny", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_run_without_a_checkpoint_says_so(run):
    Path("runs/empty").mkdir(parents=True)
    code, _, err = run("sample", "runs/empty")
    assert code == 2
    assert "has no checkpoint yet" in err


def test_a_run_whose_checkpoint_is_not_ours_is_refused(trained, run):
    torch.save({"state_dict": {}}, "runs/tiny/checkpoints/000000000032.ckpt")
    code, _, err = run("sample", "runs/tiny")
    assert code == 2
    assert "not a checkpoint of diffusion_pl's format" in err


def test_a_run_folder_that_cannot_be_written_is_one_line(run):
    Path("runs").write_text("a file where the folder should be")
    code, _, err = run("train", "tiny")
    assert code == 2
    assert "cannot be written" in err


def in_a_fresh_process(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], ["torch", "omegaconf", "lightning"]),
        (["experiments"], ["torch", "lightning"]),
        (["check", "cifar10_ddpm"], ["lightning", "torchmetrics", "torchvision"]),
    ],
)
def test_quick_commands_import_nothing_slow(words, absent):
    result = in_a_fresh_process(
        f"""
import sys
from diffusion_pl.cli import main
assert main({words}) == 0
assert not set({absent}) & set(sys.modules), set({absent}) & set(sys.modules)
"""
    )
    assert result.returncode == 0, result.stderr


def test_nothing_after_python_s_own_end_changes_the_exit_code():
    code = (
        "import atexit, ctypes, runpy, sys\n"
        "c = ctypes.CDLL(None)\n"
        "c.on_exit(ctypes.cast(c.abort, ctypes.c_void_p), None)\n"  # as a library's end may
        "atexit.register(print, 'hooks have run')\n"
        "sys.argv[1:] = ['experiments']\n"
        "runpy.run_module('diffusion_pl', run_name='__main__')\n"
    )
    buffered = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=buffered, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pyramidal_256" in done.stdout and "hooks have run" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sample", "runs/a", "--count", "1.5"], "--count: a whole number (got '1.5')"),
        (["sample", "runs/a", "--seed", "1.5"], "--seed: a whole number (got '1.5')"),
        (["replay", "runs/a", "--step", "1.5"], "--step: a whole number (got '1.5')"),
        (["launch", "tiny", "--gpus", "2.5"], "--gpus: a whole number (got '2.5')"),
        (["train", "tiny", "--run", ""], "--run: is empty, as an unset variable is"),
        (["train", "tiny", "--run="], "--run: is empty, as an unset variable is"),
        (["sample", ""], "is empty, as an unset variable is"),
        (["sample", "runs/a", "--batch-size", "0"], "--batch-size must be at least 1 (got 0)"),
        (["sample", "runs/a", "--weights", "ema:"], "a length is a number (got '')"),
        (["sample", "runs/a", "--weights", "denoiser:"], "ema, denoiser or ema:LENGTH"),
    ],
)
def test_what_a_shell_or_a_hand_mistypes_is_one_line(words, told, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_help_to_a_reader_that_left_ends_well(tmp_path):
    command = [sys.executable, "-m", "diffusion_pl", "--help"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
