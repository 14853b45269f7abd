"""What somebody new meets between a folder of photographs and a shared model, mended and kept."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from homes import ROOT, answering, trained
from prepared import file, fill, manifest, noise, prepare
from rich.console import Console
from rich.progress import Progress as Bar
from test_commands_models import TINY

from diffusion_pl import progress
from diffusion_pl.cli import main
from diffusion_pl.commands import hints
from diffusion_pl.progress import Progress

NAMES = ["Basset", "beagle", "night city"]
EXPERIMENT = (
    TINY.replace(
        "diffusion_pl.data.synthetic.Synthetic, count: 40",
        "diffusion_pl.data.shards.Shards, path: data/dogs",
    )
    .replace("classes: 8", "classes: 3")
    .replace("batch_size: 8\nnetwork", "batch_size: 6\nnetwork")
    .replace("total_images: 16, checkpoint_every: 16", "total_images: 12, checkpoint_every: 12")
    .replace("metrics: []", "metrics: [{_target_: diffusion_pl.metrics.kid.Kernel, size: 5}]")
)
METRICS = ("--metrics", "frechet")
FOLDER = ("data.dataset._target_=diffusion_pl.data.folder.ImageFolder", "data.dataset.labels=true",
          "data.dataset.resolution=8", "data.batch_size=6")  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data/dogs, three classes, and runs/tiny, trained on it."""
    place = tmp_path_factory.mktemp("home")
    pictures = {f"{name}/{i}.png": file(noise(i)) for name in NAMES for i in range(7)}
    assert prepare(fill(place / "dogs", pictures), place / "data" / "dogs", "--labels") == 0
    return trained(place, EXPERIMENT)


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    return answering(capsys)


@pytest.fixture
def on_terminal(home, monkeypatch, capsys):
    """Type a command at a terminal: its code, what stands on stdout and on stderr."""
    monkeypatch.chdir(home)

    def call(*words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: True)
            code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# The first line.

SAID = """
import io, sys
class Terminal(io.StringIO):
    seen = []
    def isatty(self):
        return True
    def write(self, text):
        self.seen.append((text, "torch" in sys.modules))
        return len(text)
sys.stderr = Terminal()
from diffusion_pl.cli import main
main(["check", "nothing"])
print(*Terminal.seen[0])
"""


def test_a_terminal_says_at_once_that_a_command_has_begun(run, tmp_path):
    """Before the libraries are read, which takes seconds; a pipe gets errors alone."""
    done = subprocess.run(
        [sys.executable, "-c", SAID],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "check: starting ... False\n"
    assert run("check", "nothing")[2].startswith("error: ")


STOPPER = """
import signal
calls = []
def stop(denoise, x, sigmas, randn_like):
    calls.append(len(x))
    if len(calls) == 2:
        signal.raise_signal(signal.SIGINT)
    return x
"""


@pytest.fixture
def interruptible():
    """As on a terminal: what a shell starts with & ignores Ctrl-C."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_an_interrupted_command_ends_in_a_line(command, run, home, tmp_path, monkeypatch):
    """Ctrl-C while the second batch is drawn; what `sample` has drawn is not drawn again."""
    (tmp_path / f"stopper_{command}.py").write_text(STOPPER)
    monkeypatch.syspath_prepend(tmp_path)
    words = [command, "runs/tiny", "--sampler", f"stopper_{command}.stop", "--count", 12]
    out = ("--out", tmp_path / "x") if command == "sample" else METRICS
    code, _, err = run(*words, "--batch-size", 6, *out)
    assert code == 130 and "Traceback" not in err
    said = f"{command}: interrupted"
    assert err.splitlines()[-1] == said + "; the same command goes on" * (command == "sample")
    if command == "sample":
        assert run(*words, "--batch-size", 6, *out)[1]["drawn"] == 6


# Results.


def test_an_evaluation_on_a_terminal_is_its_table_and_the_three_lines(on_terminal):
    words = ("evaluate", "runs/tiny", "--count", 20, *METRICS)
    code, out, err = on_terminal(*words)
    assert code == 0 and out == ""
    assert [line.split()[0] for line in err.splitlines()[-3:]] == ["measured", "of", "kept"]
    code, out, _ = on_terminal(*words, "--json")
    assert code == 0 and len(json.loads(out)["measures"]) == 1


def test_images_whose_numbers_are_kept_nowhere_say_how_to_have_them(on_terminal, tmp_path):
    assert on_terminal("sample", "runs/tiny", "--count", 12, "--out", tmp_path / "x")[0] == 0
    code, out, err = on_terminal("evaluate", tmp_path / "x", "--reference", "data/dogs", *METRICS)
    assert code == 0 and out == "" and "--json" in err.splitlines()[-1]


def test_a_sample_on_a_terminal_says_where_it_lies_and_what_classes_there_are(
    on_terminal, tmp_path
):
    code, out, err = on_terminal("sample", "runs/tiny", "--count", 2, "--out", tmp_path / "x")
    assert code == 0 and "{" not in out
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert Path(lines["grid"]).is_file() and lines["images"].startswith(f"{tmp_path}/x/images")
    assert lines["classes"].startswith("Basset, beagle, night city (3;")
    assert err.splitlines()[-1].startswith("next ")


@pytest.mark.parametrize("more", [(), ("--guidance", 2), ("--guide", "runs/tiny", "--guidance", 2)])
def test_the_bar_of_drawing_ends_full_whatever_is_drawn(more, run, home, monkeypatch, tmp_path):
    """It counts passes of the networks, guided ones too, so it moves within a batch."""
    moves, totals = [], []
    advance, add = Bar.advance, Bar.add_task

    def advanced(bar, task, count=1):
        moves.append(count)
        advance(bar, task, count)

    def added(bar, *words, total, **more):
        totals.append(total)
        return add(bar, *words, total=total, **more)

    monkeypatch.setattr(Bar, "advance", advanced)
    monkeypatch.setattr(Bar, "add_task", added)
    monkeypatch.setattr(progress, "Console", lambda **words: Console(force_terminal=True, **words))
    words = ("sample", "runs/tiny", "--count", 5, "--batch-size", 3, "--out", tmp_path / "x")
    code, *_ = run(*words, *more)
    assert code == 0, more
    assert [sum(moves)] == totals
    assert len(moves) >= 2 * 20 and max(moves) <= 6  # two batches, twenty steps


def test_a_shared_model_says_where_it_lies_and_what_classes_it_has(on_terminal, tmp_path):
    code, out, _ = on_terminal("export", "runs/tiny", tmp_path / "dogs.safetensors")
    assert code == 0 and out.splitlines()[0] == f"written  {tmp_path}/dogs.safetensors"
    words = ("import", "safetensors", tmp_path / "dogs.safetensors", tmp_path / "runs" / "dogs")
    code, out, _ = on_terminal(*words)
    assert code == 0 and "classes  Basset, beagle, night city" in out and "{" not in out


def test_prepared_data_is_told_once_on_a_terminal(on_terminal, home):
    code, out, err = on_terminal(
        "prepare", home / "dogs", "data/dogs", "--resolutions", 8, "--labels"
    )
    assert code == 0 and out == "" and err.count("diffusion_pl train") == 1


def test_an_evaluation_that_has_begun_claims_no_time_left():
    """Of the first tile nothing is known yet, and `0:00 left` would be a lie of minutes."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    progress = Progress(100, console)
    progress.start(0)
    said = []
    for done in (0, 32):
        progress.evaluating(done, 64)
        [line] = [x.plain for x in progress.lines() if x.plain.startswith("evaluation ")]
        said.append(line.removeprefix("evaluation "))
    progress.stop()
    assert said[0] == "0/64 images measured"
    assert said[1].startswith("32/64 images measured  ") and said[1].endswith(" left")


# What comes next.


def test_training_ends_with_the_classes_and_a_command_that_works_outside_a_checkout(
    home, monkeypatch, capsys
):
    monkeypatch.chdir(home)
    assert main(["train", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("classes  Basset, beagle, night city (3; one of them: --label ")
    title, *words = shlex.split(lines[-1])
    assert (title, words[1:]) == (
        "next",
        ["-m", "diffusion_pl", "sample", "runs/tiny", "--count", "64"],
    )
    assert Path(words[0]).samefile(sys.executable)


def test_a_class_whose_name_has_a_space_is_named_as_a_shell_takes_it():
    assert hints.classes(["night city"]).endswith("--label 'night city')")
    assert hints.classes([str(i) for i in range(9)]).startswith("0, 1, 2, 3, 4, 5, 6, 7, ... (9")


@pytest.mark.parametrize("said", [None, "all:\n\techo of another project\n"])
def test_make_is_named_where_it_knows_the_commands_alone(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if said is not None:
        Path("Makefile").write_text(said)
    assert hints.sample(Path("runs/a")).endswith("-m diffusion_pl sample runs/a --count 64")
    shutil.copy(ROOT / "Makefile", tmp_path / "Makefile")
    assert hints.sample(Path("runs/a")) == "make sample RUN=runs/a COUNT=64"


def test_a_record_of_others_names_no_classes(home, monkeypatch, capsys, tmp_path):
    """The names are for people; what is no list of words is passed over."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    record = tmp_path / "runs" / "tiny" / "run.json"
    for names in ({"a": 1}, [1], "Basset", None):
        record.write_text(json.dumps({**json.loads(record.read_text()), "class_names": names}))
        assert main(["train", "tiny"]) == 0
        assert "classes  " not in capsys.readouterr().out


# Make.


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["sample", "RUN=runs/a b"], ["sample", "runs/a b", "--count", "64"]),
        (["train", "EXP=tiny", "RUN=runs/a b"], ["train", "tiny", "--run", "runs/a b"]),
        (["evaluate", "RUN=runs/it's"], ["evaluate", "runs/it's"]),
        (["sweep", "RUN=a;b", "ARGS=--steps 5"], ["sweep", "a;b", "--steps", "5"]),
        (["export", "RUN=runs/a b"], ["export", "runs/a b", "runs/a b.safetensors"]),
        (["export", "RUN=runs/a/", "DEST=x y"], ["export", "runs/a/", "x y"]),
        (["import", "SOURCE=a b", "RUN=c"], ["import", "safetensors", "a b", "c"]),
        (["import", "KIND=edm", "SOURCE=a", "RUN=c"], ["import", "edm", "a", "c"]),
        (["data", "SOURCE=a b", "DEST=c", "RES=8"], ["prepare", "a b", "c", "--resolutions", "8"]),
        (["sample"], ["sample", "--count", "64"]),  # which says that RUN is missing
    ],
)
def test_make_hands_every_folder_on_as_it_is(words, typed, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nshift 2\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    installed = tmp_path / "installed"
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).touch()
    installed.touch()
    done = subprocess.run(
        [
            "make",
            "-s",
            "-f",
            ROOT / "Makefile",
            *words,
            f"RUN_PYTHON={python}",
            f"STAMP={installed}",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == typed


# Data that is not where it is looked for.


def test_a_path_with_a_typing_error_is_answered_before_anything_is_built(run, monkeypatch):
    code, _, err = run("train", "tiny", "--run", "runs/other", "data.dataset.path=data/dog")
    assert code == 2 and "data/dog: not prepared" in err and "data/dogs is there" in err
    assert not (Path("runs") / "other" / "config.yaml").exists()
    code, _, err = run("train", "tiny", "--run", "runs/other", "data.dataset.path=data/dog",
                       "network.model_channels=7")  # fmt: skip
    assert code == 2 and "data/dog: not prepared" in err


def test_a_folder_of_images_that_is_not_there_is_told_as_soon(run):
    code, _, err = run("train", "tiny", "--run", "runs/other", "data.dataset.path=dog", *FOLDER)
    assert code == 2 and "dog" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 0, "data     data/dogs: 21 images at [8] px, 3 classes"),
        (["data.dataset.path=data/dog"], 0, "data     data/dog is not there; data/dogs is"),
        (["data.dataset.path=elsewhere/x"], 0, "data     elsewhere/x is not there\n"),
        (["network.classes=4"], 2, "data/dogs: has 3 classes, network.classes is 4"),
        (["data.dataset.resolution=16", "network.resolution=16"], 2, "data/dogs: prepared at 8 px"),
        (["data.dataset.path=dogs"], 2, "dogs: not prepared"),
    ],
)
def test_check_looks_where_the_data_should_be(words, code, said, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert main(["check", "tiny", *words]) == code
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_check_of_a_folder_of_images(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert main(["check", "tiny", "data.dataset.path=dogs", *FOLDER]) == 0
    assert "data     dogs is there" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "losses", "likelihood"])
def test_a_run_that_was_copied_says_how_its_data_is_found(
    command, run, home, tmp_path, monkeypatch
):
    shutil.copytree(home / "runs" / "tiny", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    more = {"evaluate": METRICS, "losses": ("--levels", 2), "likelihood": ("--steps", 2)}[command]
    words = (command, "tiny", "--count", 12, *more)
    code, _, err = run(*words)
    assert code == 2 and "--set data.dataset.path=PATH" in err and err.count("\n") == 1
    code, *_ = run(*words, "--set", f"data.dataset.path={home}/data/dogs")
    assert code == 0
    away = ("--set", "data.dataset.path=/nowhere/at/all")
    code, _, err = run(*words, *away)
    assert code == 2 and "/nowhere/at/all: not prepared (no dataset.json here" in err
    shutil.move(tmp_path / "tiny", tmp_path / "moved")
    code, _, err = run("sample", "moved", "--count", 1)  # which needs no data
    assert code == 0 and "next " not in err
    assert err.splitlines()[-1].startswith("measure ") and "(data/dogs, its data" in err


# Measuring what was drawn.


def test_drawn_images_are_compared_with_their_runs_data(run, tmp_path):
    """By the run's metrics, extractor and reference, so that the numbers are those of the run."""
    out = tmp_path / "drawn"
    assert run("sample", "runs/tiny", "--count", 12, "--out", out)[0] == 0
    code, said, err = run("evaluate", out)
    assert code == 0 and "runs/tiny" in err
    code, of_run, _ = run("evaluate", "runs/tiny", "--count", 12)
    assert code == 0
    pairs = list(zip(said["measures"], of_run["measures"], strict=True))
    assert [one["name"][:3] for one, _ in pairs] == ["kd@", "kd_"]
    for one, other in pairs:
        assert one["name"] == other["name"]
        assert one["value"] == pytest.approx(other["value"], rel=1e-6)
        assert one["fingerprint"] == other["fingerprint"]


def test_drawn_images_whose_run_is_gone_want_a_reference(run, tmp_path):
    out = tmp_path / "drawn"
    assert run("sample", "runs/tiny", "--count", 12, "--out", out)[0] == 0
    about = json.loads((out / "sample.json").read_text())
    for name in ("runs/gone", None, 7):
        (out / "sample.json").write_text(json.dumps({**about, "run": name}))
        code, _, err = run("evaluate", out)
        assert code == 2 and "--reference DATA" in err
    assert run("evaluate", out, "--reference", "data/dogs", *METRICS)[0] == 0


def test_losses_of_fewer_images_than_asked_for_are_said(run):
    code, said, err = run("losses", "runs/tiny", "--count", 100, "--levels", 2)
    assert code == 0 and said["count"] == 21
    assert "has 21 images, fewer than 100" in err
    assert "fewer than" not in run("losses", "runs/tiny", "--count", 21, "--levels", 2)[2]


# Preparing.


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pictures_that_are_enlarged_are_counted(fit, tmp_path, capsys):
    """The shorter side decides where pictures are cut, the longer where they are padded."""
    sizes = {"a": (16, 16), "b": (16, 9), "c": (8, 7), "d": (30, 20)}
    pictures = {f"{name}.png": file(noise(0, *size)) for name, size in sizes.items()}
    source = fill(tmp_path / "x", pictures)
    words = ("--fit", fit, "--shard-images", 2)
    assert prepare(source, tmp_path / "y", *words, resolutions="16,8") == 0
    count, least = {"crop": ("2 images were", 7), "pad": ("1 image was", 8)}[fit]
    said = f"{count} smaller than 16 px (the smallest {least}) and enlarged"
    assert said in capsys.readouterr().err
    assert any(said in note for note in manifest(tmp_path / "y")["notes"])
    assert prepare(source, tmp_path / "z", *words, resolutions="7") == 0
    assert "enlarged" not in capsys.readouterr().err


def test_folders_that_were_not_taken_as_classes_are_by_the_command_that_is_said(tmp_path, capsys):
    source = fill(tmp_path / "my dogs", {f"{n}/0.png": file(noise(0)) for n in ("a", "b")})
    settings = ("--fit", "pad", "--channels", 1, "--shard-images", 1)
    assert prepare(source, tmp_path / "data", *settings, resolutions="8,4") == 0
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("with classes: ")]
    words = shlex.split(line.removeprefix("with classes: "))
    assert main(words[3:]) == 0
    made = manifest(tmp_path / "data-labelled")
    assert (made["class_names"], made["resolutions"]) == (["a", "b"], [8, 4])
    same = ("fit", "filter", "channels", "shard_images", "encoding")
    before = manifest(tmp_path / "data")
    assert {name: made[name] for name in same} == {name: before[name] for name in same}
    assert "--filter" not in words  # what was not asked for is not said
