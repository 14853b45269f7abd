"""A class is named by its name wherever `--label` stands, from the data to the drawn image."""

from __future__ import annotations

import shlex
import shutil

import numpy as np
import pytest
from homes import answering, trained
from PIL import Image
from prepared import file, fill, noise, prepare
from test_commands_models import TINY

from diffusion_pl.commands.labels import class_of
from diffusion_pl.training import checkpoint as checkpoints

NAMES = ["Basset", "beagle", "poodle"]
EXPERIMENT = (
    TINY.replace("diffusion_pl.data.synthetic.Synthetic, count: 40", "diffusion_pl.data.X, path: d")
    .replace("classes: 8", "classes: 3")
    .replace("batch_size: 8\nnetwork", "batch_size: 6\nnetwork")
    .replace("total_images: 16, checkpoint_every: 16", "total_images: 12, checkpoint_every: 12")
)


def _photographs(folder):
    return fill(folder, {f"{name}/{i}.png": file(noise(i)) for name in NAMES for i in range(3)})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run on a folder of classes, and one on the same images as shards."""
    place = tmp_path_factory.mktemp("home")
    photographs = _photographs(place / "photographs")
    assert prepare(photographs, place / "d", "--labels") == 0
    shards = EXPERIMENT.replace("diffusion_pl.data.X", "diffusion_pl.data.shards.Shards")
    folder = "diffusion_pl.data.folder.ImageFolder"
    words = [
        f"data.dataset._target_={folder}",
        "data.dataset.path=photographs",
        "data.dataset.labels=true",
    ]
    words += ["data.dataset.resolution=8", "data.batch_size=6"]
    return trained(place, shards, ["--run", "runs/folder", *words])


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    return answering(capsys)


@pytest.mark.parametrize("name", ["tiny", "folder"])
def test_sampling_takes_a_name_or_an_index(name, run, home):
    """The same images, of the class that was named; the result says which."""
    drawn = []
    for label in ("beagle", "1", 1):
        words = ("--label", label, "--count", 3, "--out", home / f"{name}{len(drawn)}")
        code, said, _ = run("sample", f"runs/{name}", *words)
        assert code == 0 and (said["label"], said["class_name"]) == (1, "beagle")
        with np.load(next((home / f"{name}{len(drawn)}").rglob("*.npz"))) as file:
            drawn.append(file["images"])
            assert (file["labels"] == 1).all()
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])


def test_a_checkpoint_that_was_moved_knows_its_classes(run, home, tmp_path):
    newest = checkpoints.latest(home / "runs" / "tiny" / "checkpoints")
    alone = tmp_path / "alone.ckpt"
    shutil.copy(newest, alone)
    code, said, _ = run("sample", alone, "--label", "poodle", "--count", 1, "--out", tmp_path / "x")
    assert code == 0 and said["label"] == 2


def _next(err):
    """The words of the command that a command's last lines give."""
    [line] = [line for line in err.splitlines() if line.startswith("next ")]
    words = shlex.split(line.removeprefix("next").strip())
    assert words[1:3] == ["-m", "diffusion_pl"]
    return words[3:]


def test_each_command_gives_the_next_from_a_run_to_another_users(run, home, tmp_path, monkeypatch):
    """Drawn, measured, exported, and drawn by name again where only the file went."""
    _, _, err = run(
        "sample", "runs/tiny", "--label", "beagle", "--count", 2, "--out", tmp_path / "x"
    )
    evaluate = _next(err)
    assert evaluate == ["evaluate", "runs/tiny"]
    code, _, err = run(*evaluate, "--count", 20, "--metrics", "frechet")
    assert code == 0 and err.splitlines()[-3].startswith("measured"), err
    export = _next(err)
    assert export == ["export", "runs/tiny", "runs/tiny.safetensors"]
    code, said, err = run(*export)
    assert code == 0
    shared = home / said["written"]
    assert shared.stat().st_mode & 0o777 == (home / "runs/tiny/config.yaml").stat().st_mode & 0o777
    bring = _next(err)
    assert bring == ["import", "safetensors", "runs/tiny.safetensors", "runs/tiny"]

    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "runs").mkdir(parents=True)
    shutil.move(shared, elsewhere / "runs")
    monkeypatch.chdir(elsewhere)
    code, _, err = run("sample", "runs/tiny.safetensors")
    assert code == 2 and "import them as a run: " in err
    code, _, err = run(*bring)
    assert code == 0
    code, said, _ = run(*_next(err), "--label", "beagle", "--count", 2)
    assert code == 0 and (said["label"], said["class_name"]) == (1, "beagle")


def test_an_unknown_name_is_answered_with_the_nearest(run):
    code, _, err = run("sample", "runs/tiny", "--label", "basset")
    assert code == 2 and err.count("\n") == 1
    assert "--label basset: no class of that name among 3; nearest: Basset, beagle, poodle" in err
    code, _, err = run("sample", "runs/tiny", "--label", "3")
    assert code == 2 and "label 3 is not one of the model's classes" in err


@pytest.mark.parametrize(
    "words",
    [
        ("progressive", "runs/tiny", "--count", 1, "--frames", 2),
        ("enlarge", "runs/tiny", "small.png"),
        ("inpaint", "runs/tiny", "whole.png", "mask.png", "--count", 1),
        ("invert", "runs/tiny", "whole.png"),
        ("interpolate", "runs/tiny", "whole.png", "whole.png", "--count", 2, "--sigma", 1),
    ],
)
def test_every_command_with_a_label_takes_the_name(words, run, home):
    Image.fromarray(np.asarray(noise(0, 4, 4))).save(home / "small.png")
    noise(1).save(home / "whole.png")
    noise(2).save(home / "mask.png")
    command, *rest = words
    code, _, err = run(command, *rest, "--label", "poodle")
    assert code == 0, err
    code, _, err = run(command, *rest, "--label", "pudel")
    assert code == 2 and "nearest: poodle" in err


def test_names_that_are_numbers_leave_the_index_first(capsys):
    names = ["1", "2", "10"]
    assert class_of("0", names, 3) == 0
    assert class_of("2", names, 3) == 2
    assert "taken as the index, of class '10'; the class called '2' is index 1" in (
        capsys.readouterr().err
    )
    assert class_of(None, names, 3) is None
    # As CIFAR's digits: name and index agree, and nothing is to be said.
    assert class_of("1", ["0", "1"], 2) == 1
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "names", "classes", "complaint"),
    [
        ("cat", [], 3, "has no names of its classes; give the index, 0 to 2"),
        ("cat", [], 0, "the model has no classes"),
        ("cat", ["cat", "cat"], 2, "2 classes have this name; give the index"),
        ("xyz", ["cat", "dog"], 2, "nearest: cat, dog"),
        ("tench", ["tench, Tinca tinca", "goldfish"], 2, "nearest: tench, Tinca tinca"),
    ],
)
def test_a_name_of_no_class_or_of_several_is_refused(word, names, classes, complaint):
    with pytest.raises(ValueError, match=complaint):
        class_of(word, names, classes)
