"""What a first user of text-to-image is told: what to set, what is cut, what was measured."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch
from prepared import file, fill, noise, prepare

from diffusion_pl import cli, config
from diffusion_pl.commands import parts
from diffusion_pl.commands.evaluate import summary_lines
from diffusion_pl.evaluation.prompts import encoded
from diffusion_pl.metrics.agreement import ANSWERS, Agreement, foreign
from diffusion_pl.metrics.features import Features
from diffusion_pl.text import encoder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    """Four images in two folders, with captions that are encoded."""
    place = tmp_path_factory.mktemp("captioned")
    images = {f"{'ab'[i % 2]}/{i}.png": file(noise(i)) for i in range(4)}
    images |= {f"{'ab'[i % 2]}/{i}.txt": b"a red star" for i in range(4)}
    source = fill(place / "source", images)
    words = ("--labels", "--encode", "minilm", "--text-length", "8", "--workers", "1")
    assert prepare(source, place / "data", *words, resolutions="8") == 0
    return place


def train_command(said: str) -> list[str]:
    return shlex.split(json.loads(said)["train"])


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("later", [True, False])
def test_the_printed_command_trains_on_what_was_encoded(captioned, capsys, labelled, later):
    """With text in the network at the widths of the encoder, dropped and guided by."""
    dest = captioned / f"data{labelled}{later}"
    words = ["--labels" if labelled else "--no-labels", "--workers", "1"]
    more = ["--encode", "minilm", "--text-length", "8"]
    capsys.readouterr()
    assert (
        prepare(captioned / "source", dest, *words, *(() if later else more), resolutions="8") == 0
    )
    said = capsys.readouterr()
    if later:
        assert "to train with them, first: " in said.err and f"{dest} --encode minilm" in said.err
        assert not any("text" in word for word in train_command(said.out))
        assert cli.main(["prepare", str(dest), *more]) == 0
        said = capsys.readouterr()
    words = train_command(said.out)
    assert f"  {shlex.join(words)}" in said.err
    experiment = parts.read(words[4], words[7:])
    data = config.build(experiment, "data.dataset")
    network = parts.meta_network(experiment)
    assert (data.text, network.text_width, network.text_length) == ("minilm", 384, 8)
    dropout = config.build(experiment, "trainer").dropout
    assert dropout == {"label": 0.1 if labelled else 0.0, "text": 0.1}
    assert network.classes == 2 * labelled and experiment.get("evaluation.guidance") == 3.0
    # And it is what the data have.
    assert data.open().texts.width == 384 and data.open().texts.length == 8


def checked(capsys, *words: object) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(["check", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out + said.err


SMALL = (
    "network.resolution=8", "network.attention=[]", "data.batch_size=4", "trainer.devices=1",
    "data.dataset.resolution=8",
)  # fmt: skip


def shards(folder: Path) -> list[str]:
    return ["data.dataset._target_=diffusion_pl.data.shards.Shards", f"data.dataset.path={folder}"]


def test_check_says_the_values_that_text_takes(captioned, capsys):
    own = ["cifar10_small", *SMALL, *shards(captioned / "data"), "network.classes=2"]
    code, said = checked(capsys, *own, "data.dataset.text=auto")
    assert code == 0 and "set network.text_width=384 network.text_length=8" in said
    text = ("network.text_width=384", "network.text_length=8")
    code, said = checked(capsys, *own, *text)
    assert code == 2 and "set data.dataset.text=auto, or network.text_width=0" in said
    scenes = ("quickstart_jit", "trainer.devices=1")
    code, said = checked(capsys, *scenes, "data.dataset.captions=minilm")
    assert code == 0 and "set network.text_width=384 network.text_length=24" in said
    code, said = checked(capsys, *scenes, *text)
    assert code == 2 and "set data.dataset.captions=minilm, or" in said


def test_text_that_is_not_there_is_told_by_who_asked_for_it(captioned, capsys, tmp_path):
    source = fill(tmp_path / "source", {f"{i}.png": file(noise(i)) for i in range(4)})
    assert prepare(source, tmp_path / "data", "--workers", "1", resolutions="8") == 0
    text = ("network.text_width=384", "network.text_length=8", "data.dataset.text=auto")
    own = ["cifar10_small", *SMALL, *shards(tmp_path / "data"), *text]
    code, said = checked(capsys, *own)
    assert code == 2 and "SET: data.dataset.text: " in said and "base.yaml" not in said
    assert "was prepared without captions" in said


def test_a_cut_prompt_begins_with_the_place(capsys):
    words = "\x1b[31m" + "a large red star beside a ring " * 30
    encoded([words], encoder("minilm", 8)).condition(0, [0])
    said = capsys.readouterr().err
    assert said.startswith("cut after '") and "\x1b" not in said and len(said) < 200
    assert "of 935 characters: prompt 1 has more than 8 tokens" in said


def test_every_number_is_a_measured_line():
    rows = [{"name": name, "value": 0.5, "n": 4} for name in ("fd@4", "agreement@4")]
    lines = summary_lines(Path("runs/x"), rows, {})
    assert lines[:2] == ["measured fd@4 = 0.5", "measured agreement@4 = 0.5"]
    assert lines[2].startswith("of ") and len(lines) == 4


def test_agreement_warns_where_the_images_are_no_scenes():
    """In every row, and so in every printed line."""
    assert foreign("synthetic-16") is None
    captions, images = ("a red star",) * 2, torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    said = {}
    for name in ("synthetic-16", "folder-photos"):
        metric = Agreement().build(None, _Reference(name), 2)  # type: ignore[arg-type]
        metric.update(Features(None, None, None, images, captions))  # type: ignore[arg-type]
        metric.compute()
        said[name] = metric.notes.get("warning")
    assert said["synthetic-16"] is None
    assert said["folder-photos"].startswith("the judge was made for synthetic scenes")
    assert len(ANSWERS) == 4


@dataclasses.dataclass
class _Reference:
    name: str


def test_an_experiment_beside_is_found_or_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("both.yaml").write_text("defaults: quickstart\nseed: 3\n")
    Path("own.yaml").write_text("defaults: both.yaml\n")
    with pytest.raises(config.ConfigError, match="own.yaml is in this folder: name it own.yaml"):
        config.load("own")
    assert config.load("own.yaml").get("seed") == 3
