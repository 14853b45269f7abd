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
