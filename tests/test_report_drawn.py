"""What a report samples from a run: each class under its name, a film, nearest training images."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import homes
import numpy as np
import pytest
import torch
from pages import parsed
from PIL import Image
from test_commands_models import TINY
from test_compare import a_run
from test_report import HOSTILE, part, plots_of, reported

from diffusion_pl.cli import main
from diffusion_pl.commands import runs
from diffusion_pl.commands.options import RunOptions, SamplerOptions
from diffusion_pl.commands.report_drawn import Copies, Drawn, _in_turn
from diffusion_pl.commands.report_read import told
from diffusion_pl.commands.report_samples import film, neighbours, samples, steps_of
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.metrics.memorised import Nearest
from diffusion_pl.page.html import section


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    return homes.trained(folder, TINY.replace("steps: 20", "steps: 4"))


def test_a_run_s_classes_film_and_neighbours_are_drawn(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    page = reported(Path("runs/tiny"), words=("--count", "16"))
    shown = part(page, "samples")
    assert [each.text for each in shown.find("figcaption")] == list(
        Synthetic(40, 8).open().class_names
    )
    assert "seed 0, averaged weights after 16 images" in shown.text
    [move] = part(page, "film").find("input")
    assert move.attributes["max"] == "4"  # four steps, then the images
    rows = {row.find("th")[0].text: [each.text for each in row.find("td")]
            for row in part(page, "nearest").find("tr")[1:]}  # fmt: skip
    assert rows["samples"][0] == "16" and rows["training images"][0] == "16"
    assert rows["training images"][1] != "100.0 %"  # each is left out among its neighbours
    assert "among 40 training images" in part(page, "nearest").text
    assert [runs for _, _, runs in plots_of(part(page, "levels"))] == [
        ["averaged weights", "raw weights"]
    ]
    assert "40 images of synthetic-8" in part(page, "levels").text
    assert not page.find("p", **{"class": "problem"})
    # What stands under the name of class 5 is what `sample` draws of it: images 5 and 13.
    name = shown.find("figcaption")[5].text
    strip = base64.b64decode(shown.find("img")[5].attributes["src"].partition(",")[2])
    assert main(["sample", "runs/tiny", "--label", name, "--first", "13", "--count", "1"]) == 0
    with Image.open("runs/tiny/drawn/images/000013.png") as picture:
        second = np.asarray(picture)
    # Each of its pixels is eight wide, and it stands after the first image and a gap of two.
    assert (np.asarray(Image.open(io.BytesIO(strip)))[::8, 66::8] == second).all()


def test_the_classes_are_drawn_in_turn(home, monkeypatch):
    monkeypatch.chdir(home)
    opened = runs.open_run(Path("runs/tiny"), SamplerOptions(), RunOptions())
    [source] = _in_turn(opened.generator).sources
    classes = source.classes
    labels = source.condition(0, range(3 * classes))["label"].tolist()
    assert labels == [*range(classes)] * 3


def test_what_cannot_be_made_is_said_and_the_rest_stands(tmp_path, capsys):
    page = reported(a_run(tmp_path / "a", {2000: 5.0}), words=())
    for name in ("samples", "film", "nearest"):
        assert "has no checkpoint yet" in part(page, name).text
    assert "not measured" in part(page, "levels").text
    assert part(page, "numbers").find("table")


def made(**more):
    image = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    found = Nearest(
        torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.1, 0.4], [0.2, 0.25]]).double()
    )
    copies = Copies(found, found, 100, 1000, True, [(0.25, image[:1].expand(3, -1, -1, -1))])
    return Drawn("so", [(HOSTILE, image), ("b", image)], [(HOSTILE, image)], copies, **more)


@pytest.mark.parametrize("make", [samples, film, neighbours])
def test_names_of_classes_and_reasons_stay_text(tmp_path, make):
    runs = [told(a_run(tmp_path / "a"), HOSTILE), told(a_run(tmp_path / "b"), "b")]
    left = dict.fromkeys(("samples", "film", "nearest"), HOSTILE)
    page = parsed(section(make(runs, [made(), Drawn(left=left)])))
    assert not page.find("script")
    assert all(each.attributes["src"].startswith("data:image/png;base64,")
               for each in page.find("img"))  # fmt: skip
    written = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert f"left out: {written}" in page.text and page.find("h3")[0].text == written


def test_the_share_of_copies_is_said(tmp_path):
    runs = [told(a_run(tmp_path / "a"), "a")]
    page = parsed(section(neighbours(runs, [made()])))
    [row] = [row for row in page.find("tr") if row.find("th")[0].text == "samples"]
    # Ratios 1/4 and 4/5: one of two is below 1/3.
    assert [each.text for each in row.find("td")] == ["2", "50.0 %", "0.25", "0.25", "0.1"]
    assert "100 of 1,000 training images and their mirror images" in page.text


def test_the_distribution_has_a_step_at_each_ratio():
    assert steps_of(torch.tensor([0.5, 0.2])) == [
        (0.0, 0.0), (pytest.approx(0.2), 0.0), (pytest.approx(0.2), 0.5), (0.5, 0.5), (0.5, 1.0),
        (1.0, 1.0),
    ]  # fmt: skip
