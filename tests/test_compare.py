"""`compare`: settings and numbers side by side, and a verdict only where intervals part."""

from __future__ import annotations

import json

import pytest

from diffusion_pl import experiment
from diffusion_pl.cli import main
from diffusion_pl.commands.compare import evenly, opened, table
from diffusion_pl.training.history import History

NAME = "fd@250/synthetic/shapes"
# Student's t, 97.5 %, of 4 degrees of freedom (any table).
T4 = 2.776


def a_run(folder, values=(), *, speed=100.0, name=NAME, blocks=(), changes=None, **more):
    """A run's folder: rows of the log every 1,000 images, a number at the images of `values`."""
    folder.mkdir()
    trained = experiment("quickstart").replace({"trainer.total_images": 4000, **(changes or {})})
    (folder / "config.yaml").write_text(trained.yaml)
    known = {"name": name, "fingerprint": "ab", "extractor": "shapes-1", "resize": "area"}
    known |= {"weights": "ema", "sampler": "deis", "guidance": 1.0, **more}
    rows = History(folder / "metrics.jsonl")
    values = dict(values)
    for images in range(1000, 1 + max(values, default=2000), 1000):
        rows.append({"images": images, "loss": 1000 / images, "images_per_second": speed})
        if images in values:
            rows.append({"images": images, **known, "value": values[images]})
    if blocks:
        row = {"images": max(values), **known, "value": sum(blocks) / len(blocks)}
        History(folder / "evaluations.jsonl").append({**row, "blocks": list(blocks)})
    return folder


def compared(capsys, *folders, code=0):
    assert main(["compare", *map(str, folders), "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert main(["compare", *map(str, folders)]) == code
    return found, capsys.readouterr().out


def test_settings_and_numbers_stand_side_by_side(tmp_path, capsys):
    changes = {"optimizer.lr": 1e-3, "optimizer.betas": [0.5, 0.9]}
    a = a_run(tmp_path / "a", {2000: 9.0, 4000: 5.0}, speed=100.0)
    b = a_run(tmp_path / "b", {1000: 8.0, 4000: 6.0}, speed=50.0, changes=changes)
    found, text = compared(capsys, a, b)
    assert found["settings"] == {
        "optimizer.lr": ["0.003", "0.001"],
        "optimizer.betas": ["[0.9, 0.95]", "[0.5, 0.9]"],
    }
    assert found["images"] == [4000, 4000]
    assert found["seconds"] == [40.0, 80.0]  # 4,000 images at 100 and 50 a second
    assert found["metrics"] == {NAME: [{"2000": 9.0, "4000": 5.0}, {"1000": 8.0, "4000": 6.0}]}
    lines = [line.split() for line in text.splitlines()]
    assert ["1,000", "-", "8"] in lines and ["4,000", "5", "6"] in lines
    # At 20 s the first has 2,000 images and the second 1,000; at 40 s the second has no newer one.
    assert ["0:20", "9", "8"] in lines and ["0:40", "5", "8"] in lines
    assert ["1:20", "5", "6"] in lines


def test_the_encoder_of_the_captions_is_a_setting(tmp_path, capsys):
    """The config may say "auto", and the same name may stand for other weights."""
    folders = [a_run(tmp_path / name, {2000: 9.0}) for name in "abc"]
    for folder, digest in zip(folders, ("12" * 32, "34" * 32), strict=False):
        text = {"encoder": "hf:x\x1by", "digest": digest}
        (folder / "run.json").write_text(json.dumps({"data": {"text": text}}))
    found, text = compared(capsys, *folders)
    said = [r'"hf:x\u001by 121212121212"', r'"hf:x\u001by 343434343434"', "null"]
    assert found["settings"] == {"text encoder": said}
    assert "\x1b" not in text and "343434343434" in text
    (folders[1] / "run.json").write_text("[" * 10_000)
    assert compared(capsys, *folders[1:])[0]["settings"] == {}


def test_the_time_is_that_of_training_alone(tmp_path):
    folder = a_run(tmp_path / "a", {2000: 9.0})
    # From here on at half the speed, as after a move to another machine.
    History(folder / "metrics.jsonl").append({"images": 3000, "loss": 1, "images_per_second": 50.0})
    [run] = opened([folder])
    assert [run.seconds(images) for images in (500, 2000, 2500, 3000)] == [5, 20, 30, 40]


@pytest.mark.parametrize(
    ("name", "first", "second", "wanted"),
    [
        (NAME, [5.0, 5.1, 4.9, 5.0, 5.0], [6.0, 6.1, 5.9, 6.0, 6.0], "a is better"),
        (NAME, [5.0, 5.1, 4.9, 5.0, 5.0], [5.1, 4.9, 5.0, 5.2, 5.1], "cannot be told"),
        ("is@250/x/y", [5.0, 5.1, 4.9, 5.0, 5.0], [6.0, 6.1, 5.9, 6.0, 6.0], "b is better"),
        (NAME, [5.0, 5.1, 4.9, 5.0, 5.0], (), "cannot be told without intervals"),
    ],
)
def test_a_verdict_needs_intervals_that_part(tmp_path, capsys, name, first, second, wanted):
    a = a_run(tmp_path / "a", {4000: 5.0}, name=name, blocks=first)
    b = a_run(tmp_path / "b", {4000: 6.0}, name=name, blocks=second)
    found, text = compared(capsys, a, b)
    assert found["verdicts"][name].startswith(wanted)
    assert ("evaluate" in text) == (not second)


def test_the_interval_is_student_s(tmp_path):
    values = [4.0, 5.0, 6.0, 5.0, 5.0]  # standard deviation sqrt(1/2)
    [run] = opened([a_run(tmp_path / "a", {4000: 5.0}, blocks=values)])
    key = (NAME, "ab", "shapes-1", "area", "ema", None)
    reach = T4 * 0.5**0.5 / 5**0.5
    assert run.interval(key) == pytest.approx((5 - reach, 5 + reach), rel=1e-3)


def test_an_interval_is_of_the_newest_checkpoint_drawn_as_in_training(tmp_path, capsys):
    folder = a_run(tmp_path / "a", {4000: 5.0}, blocks=[5.0, 5.1])
    rows = History(folder / "evaluations.jsonl")
    [row] = rows.rows()
    rows.append({**row, "blocks": [1.0, 1.1], "guidance": 3.0})
    rows.append({**row, "blocks": [2.0, 2.1], "images": 2000})
    [run] = opened([folder])
    low, high = run.interval((NAME, "ab", "shapes-1", "area", "ema", None))
    assert low < 5.05 < high


@pytest.mark.parametrize(
    "other",
    [{"fingerprint": "cd"}, {"extractor": "inception-1"}, {"name": "fd@500/synthetic/shapes"},
     {"weights": "denoiser"}, {"resize": "none"}],
)  # fmt: skip
def test_numbers_of_other_data_or_extractors_are_not_compared(tmp_path, capsys, other):
    a = a_run(tmp_path / "a", {4000: 5.0})
    b = a_run(tmp_path / "b", {4000: 6.0}, **other)
    found, text = compared(capsys, a, b)
    assert found["metrics"] == {} and found["verdicts"] == {}
    assert text.count("not compared") == 2


def test_other_sampling_is_compared_and_said(tmp_path, capsys):
    a = a_run(tmp_path / "a", {4000: 5.0})
    b = a_run(tmp_path / "b", {4000: 6.0}, sampler="heun", guidance=2.0, prompts="500 0123456789ab")
    found, text = compared(capsys, a, b)
    assert list(found["metrics"]) == [NAME]
    assert "drawn otherwise: sampler, guidance, prompts" in text
    [line] = [line for line in text.splitlines() if line.split()[:1] == ["prompts"]]
    assert line.split() == ["prompts", "-", "500", "0123456789ab"]


def test_losses_of_other_objectives_are_not_compared(tmp_path, capsys):
    a = a_run(tmp_path / "a")
    b = a_run(tmp_path / "b", changes={"objective.P_mean": 0.5})
    assert "loss: of other objectives" in compared(capsys, a, b)[1]
    c = a_run(tmp_path / "c", changes={"optimizer.lr": 1e-4})
    text = compared(capsys, a, c)[1]
    assert ["2,000", "0.5", "0.5"] in [line.split() for line in text.splitlines()]
    assert "a: no evaluation yet" in text


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["a", "a"], "named twice"),
        (["a", "b/../a"], "named twice"),
        (["a", "none"], "none: there is no run"),
        (["a", "torn"], "line 1 is no row"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, monkeypatch, capsys, words, wanted):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "torn"):
        a_run(tmp_path / name, {4000: 5.0})
    (tmp_path / "torn" / "metrics.jsonl").write_text("no JSON\n{}\n")
    assert main(["compare", *words]) == 2
    assert wanted in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [tmp_path / "x" / "mine", tmp_path / "y" / "mine"]
    for folder in folders:
        folder.parent.mkdir()
        a_run(folder)
    assert [run.name for run in opened(folders)] == [str(folder) for folder in folders]


def test_long_tables_keep_their_last_row(tmp_path):
    found = evenly(range(100), 8)
    assert (found[0], found[-1], len(found)) == (0, 99, 8)
    assert evenly([1, 2, 3], 8) == [1, 2, 3]
    assert table(["", "a"], [["long", "1"], ["x", "22"]]) == ["       a", "long   1", "x     22"]


def _held_out(folder, value, weights="ema", sigmas="5 from 0.002 to 80", data="test"):
    """A row of a held-out loss of 11 images, with a standard error of 0.01."""
    row = {"name": f"loss@11/{data}", "value": value, "standard_error": 0.01, "n": 11}
    row |= {"images": 2000, "weights": weights, "fingerprint": "cd", "sigmas": sigmas}
    History(folder / "metrics.jsonl").append({**row, "held_out": True, "levels": []})


def test_held_out_losses_are_compared_by_their_own_errors(tmp_path, capsys):
    a, b = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    for folder, values in ((a, (0.5, 0.4)), (b, (0.52, 0.5))):
        for value, weights in zip(values, ("denoiser", "ema"), strict=True):
            _held_out(folder, value, weights)
    found, text = compared(capsys, a, b)
    assert found["verdicts"] == {
        "loss@11/test of denoiser": "cannot be told, the intervals of a and b overlap",
        "loss@11/test": "a is better",
    }
    # Student's t of 10 degrees of freedom is 2.228 (any table).
    assert "a: 0.3777 to 0.4223" in text and "evaluate" not in text.replace("evaluation", "")
    assert text.count("no evaluation yet") == 2


def test_held_out_losses_at_other_noise_levels_are_not_compared(tmp_path, capsys):
    a, b = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    _held_out(a, 0.5)
    _held_out(b, 0.1, sigmas="5 from 1 to 80")
    found, text = compared(capsys, a, b)
    assert found["metrics"] == {} and text.count("alone has loss@11/test") == 2
