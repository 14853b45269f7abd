"""Images and numbers that can be found again: sample folders, kept rows, the best checkpoint."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path

import homes
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from test_commands_models import TINY

from diffusion_pl.cli import main
from diffusion_pl.commands import evaluate
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import blocks
from diffusion_pl.images import save_png
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.best import Best
from diffusion_pl.training.history import History
from diffusion_pl.training.loggers import wandb_id

OURS = TINY.replace("steps: 20", "steps: 4").replace("name: shapes", "name: pixels")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A trained run, and pictures of its data at two sizes."""
    folder = tmp_path_factory.mktemp("home")
    homes.trained(folder, OURS)
    for side in (8, 16):
        (folder / f"real{side}").mkdir()
        for i, image in enumerate(Synthetic(24, side).open().read(torch.arange(24))):
            save_png(image, folder / f"real{side}" / f"{i:02d}.png")
    return folder


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    return homes.answering(capsys)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# Sample folders


def test_images_lie_in_a_folder_of_their_own_beside_how_they_were_drawn(run, tmp_path):
    out = tmp_path / "drawn"
    code, result, err = run("sample", "runs/tiny", "--count", 6, "--out", out)
    assert code == 0, err
    assert names(out) == ["grid.png", "images", "images.npz", "sample.json"]
    assert names(result["images"]) == [f"{i:06d}.png" for i in range(6)]
    said = json.loads((out / "sample.json").read_text())
    assert (said["first"], said["count"], said["complete"], said["run"]) == (
        0,
        6,
        True,
        "runs/tiny",
    )
    settings = said["settings"]
    assert (settings["steps"], settings["seed"], settings["weights"]) == (4, 0, "ema")
    kept = Path("runs/tiny/checkpoints") / Path(said["checkpoint"]).name
    assert settings["digest"] == checkpoints.digest(kept) and len(settings["digest"]) == 64
    assert len(said["labels"]) == 6
    np.testing.assert_array_equal(np.load(out / "images.npz")["labels"], said["labels"])


def test_what_reads_folders_reads_the_images_of_a_sample_folder_alone(run, tmp_path):
    out = tmp_path / "drawn"
    run("sample", "runs/tiny", "--count", 6, "--out", out)
    shutil.copy(next(Path("real8").glob("**/*.png")), out / "mine.png")
    words = ("--reference", "real8", "--features", "pixels")
    code, result, err = run("evaluate", out, *words)
    assert code == 0, err
    row = result["measures"][0]
    assert row["n"] == 6 and row["drawn"]["settings"]["steps"] == 4
    code, result, err = run("prepare", out, tmp_path / "made", "--resolutions", 8)
    assert code == 0, err
    assert json.loads((tmp_path / "made" / "dataset.json").read_text())["count"] == 6
    (out / "mine.png").unlink()
    # Whoever removes or damages sample.json does not turn the overview into an image.
    for damage in (lambda path: path.write_text("{"), Path.unlink):
        damage(out / "sample.json")
        code, result, err = run("evaluate", out, *words)
        assert (code, result["measures"][0]["n"]) == (0, 6), err
    # A file of that name that is somebody else's changes nothing.
    shutil.copytree("real8", tmp_path / "other")
    (tmp_path / "other" / "sample.json").write_text('{"a": 1}')
    assert run("evaluate", tmp_path / "other", *words)[1]["measures"][0]["n"] == 24


def test_a_second_draw_goes_on_with_the_same_settings_alone(run, tmp_path):
    out, words = tmp_path / "drawn", ("sample", "runs/tiny", "--out", tmp_path / "drawn")
    run(*words, "--count", 4)
    before = (out / "images" / "000002.png").stat().st_mtime_ns
    code, more, err = run(*words, "--count", 3, "--first", 4)
    assert code == 0, err
    assert (more["drawn"], more["total"]) == (3, 7)
    assert run(*words, "--count", 7)[1]["drawn"] == 0
    assert (out / "images" / "000002.png").stat().st_mtime_ns == before
    assert np.load(out / "images.npz")["images"].shape == (7, 8, 8, 3)
    for change, says in (
        (("--seed", 1), "seed 0 -> 1"),
        (("--steps", 3), "steps 4 -> 3"),
        (("--weights", "denoiser"), "weights ema -> denoiser"),
        (("--label", 0), "label None -> 0"),
        (("--first", 100), "go on with --first 7"),
    ):
        code, _, err = run(*words, "--count", 2, *change)
        assert (code, err.count("\n")) == (2, 1)
        assert says in err and "--out" in err
    assert len(names(out / "images")) == 7
    # It is the same whatever was drawn at once.
    whole = tmp_path / "whole"
    run("sample", "runs/tiny", "--count", 7, "--out", whole)
    for i in range(7):
        name = f"images/{i:06d}.png"
        assert (whole / name).read_bytes() == (out / name).read_bytes()


def test_an_interrupted_draw_is_refused_as_samples_and_goes_on(run, tmp_path):
    out = tmp_path / "drawn"
    words = ("sample", "runs/tiny", "--count", 5, "--out", out)
    run(*words)
    said = json.loads((out / "sample.json").read_text()) | {"complete": False}
    (out / "sample.json").write_text(json.dumps(said))
    (out / "images" / "000003.png").unlink()
    code, _, err = run("evaluate", out, "--reference", "real8")
    assert code == 2 and "not all of its images are sampled; run the same `sample`" in err
    assert run(*words)[1]["drawn"] == 1
    assert run("evaluate", out, "--reference", "real8", "--features", "pixels")[0] == 0


def test_images_that_nothing_is_known_of_are_left_alone(run, tmp_path):
    for name in ("000000.png", "images.npz", "images/a.png"):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_bytes(b"mine")
        code, _, err = run("sample", "runs/tiny", "--count", 2, "--out", out)
        assert code == 2 and "no sample.json" in err and (out / name).read_bytes() == b"mine"


def test_a_runs_own_folders_hold_one_kind_of_images_each(run):
    _, first, _ = run("sample", "runs/tiny", "--count", 2)
    _, other, _ = run("sample", "runs/tiny", "--count", 2, "--seed", 5)
    _, again, _ = run("sample", "runs/tiny", "--count", 3)
    assert (first["folder"], other["folder"]) == ("runs/tiny/drawn", "runs/tiny/drawn-2")
    assert again["folder"] == first["folder"] and len(names(again["images"])) == 3
    assert len(names(other["images"])) == 2


# Counts, sizes, rows


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["real8", "--count", 25], "has 24 images (need 25)"),
        (["real8", "--count", 9, "--blocks", 3], "has 24 images (need 27)"),
        (["real8", "--count", 3, "--metrics", "kernel"], "at least 4 images"),
        (["real8", "--count", 3, "--metrics", "precision_recall"], "neighbour 3 needs more"),
        (["real8", "--metrics", "score", "--count", 9], "in each of 10 splits (got 9)"),
        (["real8", "--metrics", "kernel", "--subset-size", 25], "subsets of 25 need as many"),
        (["real8", "--metrics", "frechet", "--subset-size", 5], "is for the kernel distance"),
        (["real8", "--blocks", 0], "--blocks: must be at least 1"),
        (["real16", "--reference", "real8"], "is of 8 px, and the images to be measured of 16"),
        (["runs/tiny", "--count", 3, "--metrics", "kernel"], "at least 4 images"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_before_the_work(run, monkeypatch, words, says):
    def never(*_, **__):
        raise AssertionError("images are looked at")

    monkeypatch.setattr("diffusion_pl.metrics.pixels.Pixels.forward", never)
    more = [] if "--reference" in words or words[0] == "runs/tiny" else ["--reference", "real8"]
    code, _, err = run("evaluate", *words, *more, "--features", "pixels")
    assert code == 2 and says in err and err.count("\n") == 1


def test_a_reference_of_smaller_pictures_is_enlarged_only_when_asked(run):
    words = ("evaluate", "real16", "--features", "pixels")
    code, result, err = run(*words, "--reference", "real8", "--resize")
    assert code == 0, err
    assert result["measures"][0]["reference"] == "folder-real8-16"
    code, _, err = run("evaluate", "real8", "--features", "pixels", "--reference", "real16")
    assert code == 0 and "real16: its images are downsampled to 8 px" in err


def test_of_all_numbers_those_that_cannot_be_are_named(run):
    words = ("evaluate", "real8", "--reference", "real8", "--features", "shapes")
    code, result, err = run(*words, "--count", 3, "--metrics", "all")
    assert code == 0, err
    assert set(result["left_out"]) == {
        "spatial", "score", "kernel", "precision_recall", "agreement", "clip_score",
    }  # fmt: skip
    assert "left out kernel: kernel distance: needs at least 4 images" in err
    measured = [row["name"].partition("@")[0] for row in result["measures"]]
    assert measured == ["fd", "density", "coverage", "mmd"]
    _, result, _ = run(*words, "--metrics", "all", "--subset-size", 7)
    by_name = {row["name"].partition("@")[0]: row for row in result["measures"]}
    assert by_name["kd"]["subset_size"] == 7
    assert set(result["left_out"]) == {"spatial", "agreement", "clip_score"}


def test_the_same_pictures_are_at_no_distance_whatever_their_order(run, tmp_path):
    # Each of 24 pictures twice, in two orders: density by ties alone, exactly.
    for name, order in (("one", range(48)), ("two", [*range(0, 48, 2), *range(47, 0, -2)])):
        (tmp_path / name).mkdir()
        for place, index in enumerate(order):
            shutil.copy(f"real8/{index // 2:02d}.png", tmp_path / name / f"{place:02d}.png")
    found = []
    for one, two in (("one", "two"), ("two", "one"), ("one", "one")):
        code, result, err = run(
            "evaluate", tmp_path / one, "--reference", tmp_path / two,
            "--features", "shapes", "--metrics", "density_coverage,precision_recall",
        )  # fmt: skip
        assert code == 0, err
        found.append([row["value"] for row in result["measures"]])
    assert found[0] == found[1] == found[2]
    # Each ball holds itself, its copy and two pairs more: the 5th other is of the third pair.
    assert found[0] == [6 / 5, 1, 1, 1]


def test_the_rows_of_a_run_are_kept_and_the_end_says_where(run):
    code, result, err = run("evaluate", "runs/tiny", "--count", 12, "--metrics", "frechet,kernel")
    assert code == 0, err
    assert result["rows"] == "runs/tiny/evaluations.jsonl"
    kept = History(Path(result["rows"])).rows()[-3:]
    assert [row["value"] for row in kept] == [row["value"] for row in result["measures"]]
    assert {row["images"] for row in kept} == {16}
    *measured, of, where = err.strip().splitlines()[-5:]
    names = [row["name"] for row in result["measures"]]
    assert [each.split()[1] for each in measured] == names and "ema" in of
    assert where.split() == ["kept", "runs/tiny/evaluations.jsonl"]
    for row in kept:
        when = datetime.datetime.fromisoformat(row["time"])
        age = datetime.datetime.now(datetime.UTC) - when
        assert datetime.timedelta(seconds=-1) < age < datetime.timedelta(hours=1)
    training = History(Path("runs/tiny/metrics.jsonl")).rows()
    assert training and all(datetime.datetime.fromisoformat(row["time"]) for row in training)


def test_a_finished_block_is_not_lost(run, monkeypatch):
    words = ("evaluate", "runs/tiny", "--count", 8, "--metrics", "frechet", "--blocks", 3)
    measure, seen = blocks.evaluate, []
    failed = iter([True])

    def once(*arguments, first, **more):
        if first == 16 and next(failed, False):
            raise UserError("the node is gone")
        seen.append(first)
        return measure(*arguments, first=first, **more)

    monkeypatch.setattr(blocks, "evaluate", once)
    assert run(*words)[0] == 2 and seen == [0, 8]
    code, result, err = run(*words)
    assert code == 0, err
    assert seen == [0, 8, 16]
    monkeypatch.setattr(blocks, "evaluate", measure)
    _, other, _ = run(*words[:-1], 1)
    assert result["measures"][0]["blocks"][0] == other["measures"][0]["value"]
    # Other weights, seeds or counts are other blocks.
    monkeypatch.setattr(blocks, "evaluate", once)
    seen.clear()
    assert run(*words, "--seed", 3)[0] == 0 and seen == [0, 8, 16]


def test_a_run_that_cannot_be_written_is_measured_all_the_same(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.History, "append", full)
    code, result, err = run("evaluate", "runs/tiny", "--count", 8, "--metrics", "frechet")
    assert code == 0 and result["rows"] is None and result["measures"]
    assert "not kept" in err and "No space left" in err


# The best checkpoint, and loggers


@pytest.mark.parametrize("every", [8, 48])  # evaluations meet a checkpoint, or most do not
def test_the_best_checkpoint_by_a_number_stays(every, tmp_path, monkeypatch, capsys):
    words = (
        "trainer.loggers=[tensorboard]", "trainer.keep_best=fd",
        "trainer.total_images=48", f"trainer.checkpoint_every={every}", "trainer.keep=1",
        "evaluation.every=8",
        "evaluation.count=12", "evaluation.metrics=[{_target_: "
        "diffusion_pl.metrics.fid.Frechet}]", "--run", "runs/best",
    )  # fmt: skip
    homes.trained(tmp_path, OURS, words)
    monkeypatch.chdir(tmp_path)
    rows = [r for r in History(Path("runs/best/metrics.jsonl")).rows() if "name" in r]
    assert len(rows) >= 3
    least = min(rows, key=lambda row: row["value"])
    said = json.loads(Path("runs/best/best/fd.json").read_text())
    assert (said["images"], said["value"]) == (least["images"], least["value"])
    kept = checkpoints.load(Path("runs/best/best/fd.ckpt"))
    assert kept["diffusion_pl"]["images"] == least["images"]
    assert len(list(Path("runs/best/checkpoints").glob("*.ckpt"))) == 1
    run = homes.answering(capsys)
    capsys.readouterr()
    code, result, err = run("evaluate", "runs/best/best/fd.ckpt", "--count", 12)
    assert code == 0, err
    assert result["run"] == "runs/best"
    assert result["measures"][0]["value"] == pytest.approx(least["value"], rel=1e-9)
    assert main(["train", "tiny", *words]) == 0  # finished, and free to be asked for

    events = EventAccumulator("runs/best/tensorboard", size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["samples"]
    assert {event.step for event in events.Images("samples")} == {row["images"] for row in rows}
    [text] = [tag for tag in events.Tags()["tensors"] if "config" in tag]
    assert b"keep_best: fd" in events.Tensors(text)[0].tensor_proto.string_val[0]
    # What the HParams tab reads: the settings at the start of the session, and the final numbers.
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    session = HParamsPluginData.FromString(content).session_start_info.hparams
    assert session["trainer.keep_best"].string_value == "fd"
    assert session["trainer.total_images"].number_value == 48
    [final] = events.Scalars(f"final/{rows[-1]['name']}")
    assert final.value == pytest.approx(rows[-1]["value"])


@pytest.mark.parametrize(
    ("word", "says"),
    [("trainer.keep_best=fid", "fid is not measured"), ("trainer.keep_best=loss", "one of fid,")],
)
def test_a_best_number_that_is_not_measured_is_refused(home, monkeypatch, capsys, word, says):
    monkeypatch.chdir(home)
    assert main(["train", "tiny", word, "--run", f"runs/{word[-4:]}"]) == 2
    assert says in capsys.readouterr().err


def test_better_is_less_of_a_distance_and_more_of_a_score(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"a")
    for higher in (False, True):
        best = Best(tmp_path / str(higher), "x", higher=higher)
        best.path.parent.mkdir(parents=True)

        def rows(value):
            return [{"name": "x_std@9", "value": 99.0}, {"name": "x@9/r/e", "value": value}]

        assert best.is_better(rows(5.0))
        best.take(tmp_path / "a.ckpt")
        best.write(rows(5.0), 8)
        assert [best.is_better(rows(v)) for v in (4.0, 5.0, 6.0)] == [not higher, False, higher]
        best.note.write_text('{"value": ')
        assert best.is_better(rows(5.0))


def test_the_id_at_wandb_is_the_runs_own(tmp_path):
    runs = [tmp_path / name / "seed=0" for name in ("one", "two")]
    found = [wandb_id(run) for run in runs]
    assert found[0] != found[1] and found == [wandb_id(run) for run in runs]
    (tmp_path / "old" / "wandb").mkdir(parents=True)  # begun under the folder's name
    assert wandb_id(tmp_path / "old") == "old"


def test_wandb_gets_project_config_and_grids(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ("trainer.loggers=[wandb]", "trainer.wandb_project=mine", "--run", "runs/seen")
    shown = []
    from lightning.pytorch.loggers import WandbLogger

    log_image = WandbLogger.log_image

    def note(self, key, images, step=None, **more):
        shown.append((key, images[0].shape[2], step))
        return log_image(self, key, images, step, **more)

    monkeypatch.setattr(WandbLogger, "log_image", note)
    from wandb.sdk.wandb_summary import SummaryDict

    summed, update = [], SummaryDict.update
    monkeypatch.setattr(
        SummaryDict, "update", lambda self, d, *more: summed.append(d) or update(self, d, *more)
    )
    started = []
    monkeypatch.setattr(wandb, "init", lambda init=wandb.init, **k: started.append(k) or init(**k))
    homes.trained(tmp_path, OURS, words)
    wandb.finish()
    [asked] = started
    identity = (tmp_path / "runs/seen/wandb_id").read_text().strip()
    assert (asked["project"], asked["id"], asked["resume"]) == ("mine", identity, "allow")
    assert asked["config"]["sampler"]["steps"] == 4
    assert shown and shown[-1] == ("samples", 3, 16)
    assert any(key.startswith("final/") for update in summed for key in update)
    assert list((tmp_path / "runs/seen/wandb").glob(f"offline-run-*-{identity}"))
