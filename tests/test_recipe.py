"""`recipe`: from a prepared folder to an experiment that `train` takes, with its reasons."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from prepared import file, fill, prepare

from diffusion_pl import cli, config
from diffusion_pl.commands import recommend
from diffusion_pl.commands.recipe import _chosen, _head, written
from diffusion_pl.data.shard_format import Manifest
from diffusion_pl.data.shards import Shards
from diffusion_pl.evaluation.evidence import Evidence, Learned
from diffusion_pl.images import from_bytes
from diffusion_pl.signals import MARKER, RESUMABLE
from diffusion_pl.training.history import History

QUICK = ("--probe", "1000", "--hours", "0.002")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with pictures of a colour each, prepared in two classes."""
    folder = tmp_path_factory.mktemp("home")
    draw = np.random.default_rng(0)
    colours = draw.integers(60, 200, (24, 1, 1, 3)) + draw.integers(-9, 9, (24, 8, 8, 3))
    pictures = {
        f"{'ab'[i % 2]}/{i}.png": file(Image.fromarray(each.astype(np.uint8)))
        for i, each in enumerate(colours)
    }
    fill(folder / "pictures", pictures)
    assert prepare(folder / "pictures", folder / "mine", "--labels", resolutions="8") == 0
    return folder


@pytest.fixture(scope="module")
def found(home) -> tuple[dict, str]:
    """What the command printed, and the file it wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert cli.main(["recipe", "mine", *QUICK, "--json"]) == 0
    return json.loads(out.getvalue()), (home / "mine.yaml").read_text()


def test_the_experiment_says_what_was_measured(home, found):
    said, text = found
    clean = from_bytes(Shards(str(home / "mine"), 8).open().read(torch.arange(24))).double()
    read = yaml.safe_load(text)
    assert read["defaults"] == said["defaults"] == "cifar10_small"
    assert read["objective"]["sigma_data"] == pytest.approx(clean.std().item(), rel=2e-3)
    assert read["network"]["classes"] == 2 and read["network"]["resolution"] == 8
    assert read["data"]["dataset"]["path"] == "mine"
    # A colour has no direction.
    assert read["data"]["hflip"] is True
    # The levels are those where the short training learned.
    rows = History(home / "runs/mine-probe/metrics.jsonl").rows()
    held = [row["levels"] for row in rows if "levels" in row and row["weights"] == "ema"]
    before, after = (torch.tensor([each["loss"] for each in row]) for row in (held[0], held[-1]))
    weights = (before.clamp_max(1) - after.clamp_max(1)).clamp_min(0)
    places = torch.tensor([level["sigma"] for level in held[0]]).log()
    mean = (weights * places).sum() / weights.sum()
    assert read["objective"]["P_mean"] == pytest.approx(mean.item(), abs=0.05)
    for level, line in zip(held[0], [each for each in text.splitlines() if each.startswith("#")
                                     and each.count(".") >= 3][-16:], strict=True):  # fmt: skip
        assert float(line.split()[1]) == pytest.approx(level["sigma"], rel=1e-3)


def test_every_reason_stands_beside_its_setting(found):
    _, text = found
    for key in ("sigma_data", "P_mean", "P_std", "total_images", "hflip", "batch_size"):
        [line] = [each for each in text.splitlines() if each.strip().startswith(f"{key}:")]
        assert "  # " in line
    assert "24; 24 looked at" not in text and "24, 2 classes (12 to 12 each); 24 looked at" in text


def test_the_budget_is_the_time_at_the_measured_speed(found):
    said, _ = found
    images = said["settings"]["trainer.total_images"]
    wanted = min(said["images_per_second"] * 0.002 * 3600, 400 * 24)
    assert images == max(4000, int(wanted) // 400 * 400)


def test_the_budget_ends_with_the_time_or_with_the_passes(home):
    manifest = Manifest.read(home / "mine")  # 24 images
    seen = Evidence(24, (12, 12), 0.0, 0.5, 2.0, 0.1, 0.0, None, None)
    plan = recommend.Plan(recommend.SMALL, [], 10**6, None, "", [])
    for hours, images in ((0.001, 4000), (0.02, 7200), (5.0, 9600)):
        settings = _chosen(plan, manifest, seen, Learned((), 0, 1), 100.0, hours)
        assert settings["trainer.total_images"] == images
        assert settings["lr_schedule.cooldown"] == images * 3 // 4


def test_train_takes_it_and_the_short_training_is_not_repeated(home, found, monkeypatch, capsys):
    monkeypatch.chdir(home)
    before = (home / "runs/mine-probe/metrics.jsonl").read_bytes()
    assert cli.main(["recipe", "mine", *QUICK, "--out", "again.yaml"]) == 0
    assert (home / "runs/mine-probe/metrics.jsonl").read_bytes() == before
    assert "train again.yaml --run runs/mine" in capsys.readouterr().err
    one, two = (config.load(str(home / name)).tree for name in ("mine.yaml", "again.yaml"))
    assert one["objective"] == two["objective"]
    short = ["trainer.total_images=64", "evaluation.metrics=[]", "evaluation.losses=null"]
    assert cli.main(["train", "mine.yaml", "--run", "runs/mine", *short]) == 0
    assert cli.main(["sample", "runs/mine", "--count", "2", "--label", "b"]) == 0


def test_what_is_not_prepared_or_out_of_range_is_refused(home, found, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for words, why in (
        (["pictures"], "is no prepared folder; prepare the images first"),
        (["mine"], "mine.yaml: exists; name another file by --out"),
        (["mine", "--out", "x.yaml", "--hours", "0"], "--hours must be above 0"),
        (["mine", "--out", "x.yaml", "--hours", "nan"], "--hours must be above 0"),
        (["mine", "--out", "x.yaml", "--probe", "999"], "--probe at least 1,000"),
    ):
        capsys.readouterr()
        assert cli.main(["recipe", *words]) == 2
        assert why in capsys.readouterr().err
    assert not (home / "x.yaml").exists()


def test_an_experiment_is_written_as_it_is_read():
    settings = {"a.b": 1.5, "a.c.d": [1, 2], "a.c.e": None, "f": "a: b # c", "g": True, "h": "yes"}
    text = written("base", settings, {"a.b": "why", "a.c": "all of it"}, ["first", "", "last"])
    assert text.startswith("# first\n#\n# last\n\ndefaults: base\n\na:\n  b: 1.5  # why\n")
    assert "  c:  # all of it\n    d: [1, 2]\n" in text
    assert yaml.safe_load(text) == {
        "defaults": "base",
        "a": {"b": 1.5, "c": {"d": [1, 2], "e": None}},
        "f": "a: b # c",
        "g": True,
        "h": "yes",
    }


def test_names_of_folders_stay_in_their_comment(home):
    name = "x\ndefaults: other\u202e"
    seen = Evidence(24, (12, 12), 0.0, 0.5, 2.0, 0.1, 0.0, None, None)
    head = _head(name, Manifest.read(home / "mine"), seen, Learned((), 0, 1),
                 recommend.Machine("cpu", "2 CPU cores", 2, 1e10))  # fmt: skip
    text = written("base", {}, {}, head)
    assert [each for each in text.splitlines() if each and not each.startswith("#")] == [
        "defaults: base"
    ]
    assert "\u202e" not in text


def test_a_published_experiment_of_another_objective_keeps_it(home):
    manifest = Manifest.read(home / "mine")
    seen = Evidence(24, (12, 12), 0.0, 0.5, 2.0, 0.1, 0.0, None, 1.5)
    learned = Learned((), -1.0, 0.3)
    for name, known in (("cifar10_edm", True), ("cifar10_ddpm", False)):
        plan = recommend.Plan(name, [], 10**6, None, "", [])
        settings = _chosen(plan, manifest, seen, learned, 100.0, 1.0)
        assert ("objective.P_mean" in settings) == known
        assert settings["data.hflip"] is False
    assert settings.get("trainer.total_images") is None
    small = recommend.Plan(recommend.SMALL, [], 10**6, None, "", [])
    assert _chosen(small, manifest, seen, learned, 100.0, 1.0)["objective.P_std"] == 0.6


def test_a_stopped_recipe_leaves_its_mark_and_goes_on(home, tmp_path):
    words = [sys.executable, "-m", "diffusion_pl", "recipe", str(home / "mine"), "--out", "x.yaml"]
    words += ["--hours", "0.002", "--probe", "6000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    mine = tmp_path / "runs" / "mine-probe"
    with subprocess.Popen(
        words, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(b"training "):  # the first step is done
                process.send_signal(signal.SIGTERM)
                break
        process.stderr.read()
    assert process.returncode == RESUMABLE and (mine / MARKER).exists()
    assert not (tmp_path / "x.yaml").exists()
    subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert (tmp_path / "x.yaml").exists() and not (mine / MARKER).exists()
