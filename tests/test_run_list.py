"""`runs`: the state of every run below a folder, from its files."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys

import pytest
from test_compare import a_run

from diffusion_pl import locks
from diffusion_pl.cli import main
from diffusion_pl.commands.compare import table
from diffusion_pl.commands.run_list import age_of, cut, fitted
from diffusion_pl.training.history import History


def listed(capsys, folder):
    assert main(["runs", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out or "{}")
    assert main(["runs", str(folder)]) == 0
    return found, capsys.readouterr().out


def test_every_run_is_listed_with_its_state(tmp_path, capsys):
    (tmp_path / "group").mkdir()
    a_run(tmp_path / "group" / "whole", {4000: 5.25})
    a_run(tmp_path / "half", {1000: 9.0, 2000: 8.0})
    a_run(tmp_path / "broken", {2000: 8.0})
    (tmp_path / "broken" / "FAILED").write_text("the loss is not finite\nat step 3\n")
    a_run(tmp_path / "torn")
    (tmp_path / "torn" / "metrics.jsonl").write_text("nothing\n{}\n")
    a_run(tmp_path / "new").joinpath("metrics.jsonl").write_text("")
    a_run(tmp_path / "live", {2000: 8.0})
    (tmp_path / "no run").mkdir()
    with locks.hold(tmp_path / "live" / locks.NAME, "training"):
        found, text = listed(capsys, tmp_path)
    assert {name: (run["state"], run["images"]) for name, run in found.items()} == {
        "group/whole": ("finished", 4000),
        "half": ("stopped", 2000),
        "broken": ("failed", 2000),
        "torn": ("unreadable", 0),
        "new": ("begun", 0),
        "live": ("running", 2000),
    }
    assert found["half"]["metric"] == "fd@250 8"
    assert found["broken"]["why"] == "the loss is not finite"
    assert found["live"]["why"].startswith("process ")
    rows = [line.split() for line in text.splitlines()]
    assert ["half", "stopped", "50", "%", "2,000", "fd@250", "8"] in rows
    assert listed(capsys, tmp_path)[0]["live"]["state"] == "stopped"  # its process has let go


def test_the_age_is_that_of_the_newest_row(tmp_path, capsys):
    folder = a_run(tmp_path / "a")
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=3, minutes=5)
    row = {"images": 2000, "loss": 1.0, "time": then.isoformat(timespec="seconds")}
    History(folder / "metrics.jsonl").append(row)
    found, text = listed(capsys, tmp_path)
    assert 11_099 <= found["a"]["seconds"] < 11_400
    assert text.splitlines()[-1].endswith("3 h")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (86_399, "23 h"), (86_400, "1 d")],
)
def test_ages_are_in_their_largest_unit(seconds, text):
    assert age_of(seconds) == text


def test_a_folder_without_runs_and_none_at_all(tmp_path, capsys):
    assert listed(capsys, tmp_path) == ({}, f"{tmp_path}: no run yet\n")
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_a_run_s_own_folder_and_those_within_runs(tmp_path, capsys):
    folder = a_run(tmp_path / "a", {4000: 5.0})
    a_run(folder / "samples", {4000: 5.0})  # within a run: its own affair
    assert len(listed(capsys, tmp_path)[0]) == 1
    assert list(listed(capsys, folder)[0]) == [str(folder)]


def test_names_and_reasons_cannot_command_a_terminal(tmp_path, capsys):
    folder = a_run(tmp_path / "a", {2000: 8.0})
    (folder / "FAILED").write_text("\x1b[2Jgone\n")
    assert "\x1b" not in listed(capsys, tmp_path)[1]


@pytest.mark.parametrize("module", ["run_list", "compare"])
def test_it_answers_without_torch(module):
    code = f"import sys, diffusion_pl.commands.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_list_fits_a_terminal_and_names_keep_both_ends():
    head = ["run", "state", "", "images", "newest number", "age"]
    row = ["finished", "100 %", "200,000,000", "fid@50000 12.34", "12 min"]
    names = ["a", "cifar10_edm_a_vp/optimizer.lr=0.001/a long word of its own/seed=12"]
    rows = fitted(head, [[name, *row] for name in names], 80)
    lines = table(head, rows, left=(0, 1, 4))
    assert max(map(len, lines)) == 80
    assert rows[0][0] == "a" and rows[1][0].startswith("cifar1") and rows[1][0].endswith("/seed=12")
    assert fitted(head, [[name, *row] for name in names], 200)[1][0] == names[1]
    assert [len(cut("x" * 40, n)) for n in (12, 39, 40, 41)] == [12, 39, 40, 40]


def test_a_held_out_loss_is_not_the_newest_number(tmp_path, capsys):
    folder = a_run(tmp_path / "a", {2000: 8.0})
    row = {"images": 3000, "name": "loss@4/x", "value": 1.0, "levels": [], "weights": "ema"}
    History(folder / "metrics.jsonl").append(row)
    assert listed(capsys, tmp_path)[0]["a"]["metric"] == "fd@250 8"
