"""`replay`: a step of a run again, to the loss and the gradient that the run logged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from homes import answering, trained
from PIL import Image
from test_cli import TINY

from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.training.history import History

EXPLODING = '''"""A network whose output has no value from a step on."""
import torch
from torch import nn


class Exploding(nn.Module):
    classes, channels = 0, 3

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("calls", torch.zeros(()))

    def check_resolution(self, height, width):
        pass

    def forward(self, x, c_noise):
        if self.training:
            self.calls += 1
        return self.mix(x) / (self.calls <= 3)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    more = TINY.replace("  batch_size: 8\n", "  batch_size: 8\n  hflip: true\n") + "augment: null\n"
    return trained(folder, more, ["--run", "runs/passes", "trainer.device_batch_size=3"])


@pytest.fixture
def answer(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    return answering(capsys)


@pytest.mark.parametrize("run", ["tiny", "passes"])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_step_has_the_loss_and_the_gradient_that_the_run_logged(run, step, place, answer):
    code, result, _ = answer("replay", f"runs/{run}", "--step", step)
    rows = {row["step"]: row for row in History(place / "runs" / run / "metrics.jsonl").rows()
            if "loss" in row}  # fmt: skip
    assert code == 0
    logged = rows[step + 1]  # a row a step, written after it
    assert result["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    assert result["gradient_norm"] == pytest.approx(logged["gradient_norm"], rel=1e-6)
    losses = [image["loss"] for image in result["images"]]
    assert np.mean(losses) == pytest.approx(logged["loss"], rel=1e-6)
    assert [image["position"] for image in result["images"]] == [*range(8 * step, 8 * step + 8)]


def test_it_starts_from_the_newest_checkpoint_before_the_step(answer):
    # Two stay: those after 24 and 32 images.
    assert answer("replay", "runs/tiny", "--step", 3)[1]["checkpoint"].endswith("000000000024.ckpt")
    assert answer("replay", "runs/tiny", "--step", 2)[1]["checkpoint"] is None


def test_it_names_the_images_of_the_step_and_draws_them(place, answer):
    _, result, _ = answer("replay", "runs/tiny", "--step", 1)
    images = Synthetic(40, 16).open()
    sheet = np.asarray(Image.open(place / result["picture"]))
    for column, image in enumerate(result["images"]):
        index = image["index"]
        assert image["label"] == int(images.labels[index])
        assert image["file"] == "synthetic-16"
        real = images.read(torch.tensor([index]))[0].numpy().transpose(1, 2, 0)
        seen = sheet[: 4 * 16 : 4, column * 66 : column * 66 + 64 : 4]
        assert (seen == real).all() or (seen == real[:, ::-1]).all()  # or its mirror image


def test_a_run_that_ended_without_a_value_is_looked_at(place, answer, monkeypatch):
    (place / "exploding.py").write_text(EXPLODING)
    monkeypatch.syspath_prepend(place)
    (place / "experiments" / "broken.yaml").write_text(
        "# A run that breaks (no published number)\ndefaults: tiny\n"
        "network: {_target_: exploding.Exploding}\nevaluation: {every: 1000}\n"
        "trainer: {dropout: {label: 0}}\n"
    )
    code, _, err = answer("train", "broken")
    assert code == 1
    assert "the loss is" in err and "at step 3, 24 images" in err
    assert "python -m diffusion_pl replay runs/broken --step 3" in err
    values = [
        answer("replay", "runs/broken", "--step", step, "--allow", "exploding")[1]["loss"]
        for step in (2, 3)
    ]
    assert np.isfinite(values[0]) and values[1] in ("inf", "nan")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["runs/tiny", "--step", "-1"], "--step must not be negative (got -1)"),
        (["runs/absent", "--step", "1"], "runs/absent: is no run"),
    ],
)
def test_what_cannot_be_replayed_is_one_clear_line(words, complaint, answer):
    code, _, err = answer("replay", *words)
    assert code == 2 and complaint in err and err.count("\n") == 1


def test_nothing_is_written_but_the_picture(place, answer):
    before = sorted(path for path in (place / "runs" / "tiny").rglob("*") if path.is_file())
    answer("replay", "runs/tiny", "--step", 1, "--out", "pictures")
    after = sorted(path for path in (place / "runs" / "tiny").rglob("*") if path.is_file())
    assert before == after and (place / "pictures" / "000000001.png").exists()
