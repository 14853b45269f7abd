"""Options of the command line: defaults are what help says, lists and weights are read whole."""

from __future__ import annotations

import argparse
import re

import pytest

from diffusion_pl import cli


def options():
    """Every option of every command, with the command's name."""
    top = cli.parser()
    commands = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    return [(name, each) for name, part in commands.choices.items() for each in part._actions]


def test_a_default_is_what_help_says_it_is():
    said = 0
    for name, option in options():
        words = re.search(r"\(([\w.:-]+)\)$", option.help or "")
        default = option.default
        default = default[0] if isinstance(default, list) and default else default
        if words and not isinstance(default, bool) and default not in (None, [], "==SUPPRESS=="):
            assert words[1] == str(default), (name, option.option_strings)
            said += 1
    assert said > 25


def test_features_are_the_runs_own_for_a_run_and_chosen_by_the_data_for_a_reference():
    assert cli.parse(["evaluate", "runs/a"]).features is None
    assert cli.parse(["sweep", "runs/a"]).features is None
    assert cli.parse(["reference", "data"]).features == "auto"
    for words in (["evaluate", "runs/a"], ["reference", "data"]):
        assert cli.parse(words).feature_precision == "fp32"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "x", "--run", "s3://bucket/run"],
        ["train", "x", "--run=gs://bucket/run"],
        ["train", "x", "--from", "hf://a/b"],
        ["sample", "https://host/run"],
        ["sample", "r", "--out", "s3a://bucket/out"],
        ["import", "edm", "https://host/a.pkl", "r"],
        ["export", "r", "s3://bucket/x.safetensors"],
        ["prepare", "a", "s3://bucket/set", "--resolutions", "8"],
        ["enlarge", "r", "a.png", "https://host/b.png"],
    ],
)
def test_an_address_where_only_a_file_can_be_makes_no_folder(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2
    assert "is an address, and this is a file or folder of this machine" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_folder_with_a_colon_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:" / "b").mkdir(parents=True)
    (tmp_path / "run:" / "b").mkdir(parents=True)
    for word in ("a:/b", "run:/b", "C:/new", "run:1", "x/a:/b"):
        assert str(cli.parse(["sample", word]).run) == word


def test_lists_of_a_sweep_are_read_whole():
    words = ["sweep", "runs/a", "--steps", "4,8,16", "--guidance", "1,1.5", "--samplers", "ddim,,"]
    found = cli.parse([*words, "--weights", "ema,denoiser,ema:0.05"])
    assert found.steps_list == [4, 8, 16]
    assert found.guidance_list == [1.0, 1.5]
    assert found.samplers == ["ddim"]
    assert found.weights_kinds == ["ema", "denoiser", "ema:0.05"]
    assert cli.parse(["sweep", "runs/a"]).weights_kinds == ["ema"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sweep runs/a --weights raw", "ema, denoiser or ema:LENGTH (got 'raw')"),
        ("sweep runs/a --weights denoiser:0.1", "ema, denoiser or ema:LENGTH"),
        ("sweep runs/a --weights ema:long", "a length is a number (got 'long')"),
        ("sweep runs/a --steps 4,many", "invalid numbers value: '4,many'"),
        ("sweep runs/a --guidance weak", "invalid numbers value: 'weak'"),
    ],
)
def test_a_word_that_is_none_of_them_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.parse(words.split())
    assert left.value.code == 2
    assert message in capsys.readouterr().err
