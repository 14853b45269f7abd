"""What a person types: words that YAML reads as something else, and experiments that lie anywhere.

YAML 1.1 (yaml.org/type/int.html): 0 in front is octal, a colon between digits is base 60.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from diffusion_pl import config
from diffusion_pl.cli import main, parse
from diffusion_pl.config import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """Run `check quickstart` with overrides, in a folder without experiments."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides: str) -> tuple[int, str]:
        code = main(["check", "quickstart", *overrides])
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("augment=None", "SET: augment: None is a word to YAML, not nothing; write null"),
        ("data.sizes=[None, 1]", "SET: data.sizes: None is a word to YAML"),
        ("augment=abc", "SET: augment: must be null or a node with _target_ (got 'abc')"),
        ("optimizer=abc", "SET: optimizer: must be a node with _target_ (got 'abc')"),
        (
            "trainer.total_images=010",
            "SET: trainer.total_images: 010 is 8 to YAML, as octal; write 10, or",
        ),
        ("trainer.total_images=-0017", "-0017 is -15 to YAML, as octal; write -017, or '-0017'"),
        ("sampler.levels=[16, 032]", "SET: sampler.levels: 032 is 26 to YAML"),
        ("trainer.total_images=1:30", "1:30 is a number to base 60 to YAML; write it out"),
        (
            "data.resolution_weights={16:1}",
            "SET: data.resolution_weights: '16:1' is one word to YAML; write a space, 16:",
        ),
        ("data.resolution_weights={a:1, b: 2}", "'a:1' is one word to YAML; write a space, a: 1"),
        ("optimizer.lr=abc", "optimizer.lr: must be float or a node with _target_ that makes"),
        ("lr=abc", "SET: lr: unknown section; did you mean 'optimizer.lr'?"),
        ("steps=9", "SET: steps: unknown section; did you mean 'sampler.steps'?"),
        ("evaluation.guidance_interval=[-inf, 1]", "guidance_interval.0: must be finite"),
        ("trainer.grad_clip=inf", "trainer.grad_clip: must be finite (got inf)"),
        ("evaluation.guidance_interval=[0, .nan]", "guidance_interval.1: must be finite"),
        ("data.dataset.path=~nobody-at-all/x", "~nobody-at-all is nobody's home here"),
    ],
)
def test_what_was_typed_gets_a_sentence(said, typed: str, says: str) -> None:
    code, err = said(typed)
    assert code == 2
    assert says in err and err.count("\n") == 1


def test_every_wrong_word_is_told_at_once(said) -> None:
    code, err = said("foo=", "trainer.total_images=010", "optimzer.lr=1", "seed=1")
    assert code == 2
    assert [line.split(": ")[1] for line in err.removeprefix("error: ").splitlines()] == [
        "foo", "trainer.total_images", "optimzer.lr",
    ]  # fmt: skip


def test_a_sum_of_values_that_do_not_go_together_names_what_was_typed(said) -> None:
    code, err = said("trainer.keep_every=3", "seed=1")
    assert code == 2
    assert "quickstart.yaml + SET trainer.keep_every=3: trainer: keep_every must be" in err
    assert "seed=1" not in err


@pytest.mark.parametrize("typed", ["inf", ".inf"])
def test_inf_may_be_written_where_it_is_the_default(said, typed: str) -> None:
    assert said(f"evaluation.guidance_interval=[0, {typed}]")[0] == 0


@pytest.mark.parametrize(
    "text",
    ["a: '010'", 'a: "None"', "a: 0", "a: 0.5", "a: '16:1'", "a: b:c", "a: {b: 'None'}"],
)
def test_what_is_quoted_or_plain_is_left_alone(tmp_path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert config.load("x", folder=tmp_path).tree


def test_a_file_names_the_line_of_a_word(tmp_path) -> None:
    (tmp_path / "x.yaml").write_text("a: 0\nb:\n  c: None\nd: 010\n")
    with pytest.raises(ConfigError) as error:
        config.load("x", folder=tmp_path)
    first, second = str(error.value).splitlines()
    assert "x.yaml: line 3: None is a word" in first and "line 4: 010 is 8" in second


def test_a_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("a: ~/photos\nb: [~/one, x~/two, '~']\nc: ~\n")
    tree = config.load("x", ["d=~/shards"], folder=tmp_path).tree
    assert tree == {
        "a": f"{tmp_path}/photos",
        "b": [f"{tmp_path}/one", "x~/two", str(tmp_path)],
        "c": None,
        "d": f"{tmp_path}/shards",
    }
    call = parse(["train", "~/x.yaml", "--run=~/runs/x", "--from=~/y", "seed=1"])
    assert call.words == (f"{tmp_path}/x.yaml", "seed=1")
    assert call.keywords["run"] == tmp_path / "runs" / "x"
    assert call.keywords["options"].start == tmp_path / "y"
    assert parse(["enlarge", "r", "~/a.png"]).words[1] == (tmp_path / "a.png",)
    wanted = parse(["evaluate", "r", "--reference=~/real"]).keywords["wanted"]
    assert wanted.reference == f"{tmp_path}/real"


def test_an_infinite_value_survives_the_checkpoint(tmp_path) -> None:
    (tmp_path / "x.yaml").write_text("a: [0, inf]\nb: -inf")
    loaded = config.load("x", folder=tmp_path)
    assert loaded.tree == {"a": [0, math.inf], "b": -math.inf}
    (tmp_path / "y.yaml").write_text(config.dump(loaded))
    assert config.load("y", folder=tmp_path).tree == loaded.tree


# Experiments anywhere


def test_an_experiment_may_lie_anywhere_over_one_of_ours(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far").mkdir()
    own = tmp_path / "far" / "mine.yaml"
    own.write_text("defaults: quickstart\ntrainer: {total_images: 1600}\n")
    assert main(["check", str(own)]) == 0
    assert "1,600 images = 100 steps" in capsys.readouterr().out
    loaded = config.load(own)
    assert loaded.origin("network").endswith("experiments/quickstart.yaml")
    own.write_text("defaults: qickstart\n")
    with pytest.raises(ConfigError, match="got 'qickstart'.*did you mean 'quickstart'"):
        config.load(own)


def test_what_lies_beside_a_file_comes_before_ours(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("a: 1")
    (tmp_path / "mine.yaml").write_text("defaults: base\nb: 2")
    assert config.load("./mine.yaml").tree == {"a": 1, "b": 2}
    # One that is named like ours lies over it, and is found first by its name.
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "quickstart.yaml").write_text("defaults: quickstart\nseed: 77")
    loaded = config.load("quickstart")
    assert loaded.get("seed") == 77 and loaded.get("sampler.steps")
    assert config.load("./mine.yaml", ["c=3"]).tree["c"] == 3


def test_several_experiments_are_checked_at_once(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("defaults: quickstart\nnetwork: {dpeth: 1}\n")
    words = ["check", "quickstart", "./bad.yaml", "cifar10_edm", "./nowhere.yaml", "seed=3"]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out.count("network ") == 2 and "cifar10_edm:\n" in out
    assert "bad.yaml: network.dpeth: unknown argument" in err
    assert "./nowhere.yaml: no such file" in err and err.count("\n") == 2


def test_ours_are_listed_everywhere(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["experiments"]) == 0
    assert "cifar10_edm" in capsys.readouterr().out
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text("# My own\na: 1")
    assert main(["experiments"]) == 0
    out, err = capsys.readouterr()
    assert out == "mine  My own\n" and "that come with the package" in err
    assert main(["experiments", "--all"]) == 0
    assert "My own" in (out := capsys.readouterr().out) and "cifar10_edm" in out


def test_an_installed_package_has_the_experiments(tmp_path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="builds the package by setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "experiments"):
        os.symlink(ROOT / name, source / name)
    os.symlink(ROOT / "diffusion_pl", source / "diffusion_pl")
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    ours = {p.name for p in (ROOT / "experiments").iterdir() if p.suffix in (".yaml", ".txt")}
    assert {Path(n).name for n in names if n.startswith("diffusion_pl/experiments/")} == ours
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "mine.yaml").write_text("defaults: quickstart\nseed: 5\n")
    program = "from diffusion_pl import config; c = config.load('./mine.yaml'); print(c.origins)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{tmp_path}/site/diffusion_pl/experiments/quickstart.yaml" in done.stdout
