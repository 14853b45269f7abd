"""Held-out loss: fixed images and noise, the same for any number of ranks; training as without."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import started
import torch
from test_evaluation_ranks import Smooth
from test_training import experiment, go, measurements, network, same  # noqa: F401
from torch import nn

from diffusion_pl.data.cifar10 import CIFAR10
from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.degradations import Downsampled
from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.held_out import HeldOut, measure, open_held_out
from diffusion_pl.evaluation.settings import Losses
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History, is_held_out

PLAIN = SimpleNamespace(classes=0, text_width=0, image_channels=0)


class Wiener(nn.Module):
    """The posterior mean of white pixels of a standard deviation."""

    def __init__(self, std):
        super().__init__()
        self.std = nn.Parameter(torch.tensor(std))

    def forward(self, x, sigma):
        return x * self.std**2 / (self.std**2 + sigma**2)


def gaussian(count=40, std=0.3):
    """White pixels as bytes."""
    noise = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = (127.5 + 127.5 * std * noise).round().clamp(0, 255).byte()
    return HeldOut("white", "all", True, "f" * 64, pixels, {})


def test_the_best_linear_denoiser_of_white_pixels_has_loss_one():
    held = gaussian()
    row = measure(held, Losses(count=40, levels=5), Wiener(held.sigma_data), (0.02, 50.0))
    assert row["name"] == "loss@40/white"
    assert row["value"] == pytest.approx(1, abs=4 * row["standard_error"])
    assert 0 < row["standard_error"] < 0.02  # 5 levels of 30,720 pixels
    assert [level["sigma"] for level in row["levels"]] == pytest.approx(
        [0.02 * 2500 ** (i / 4) for i in range(5)]
    )
    assert all(level["loss"] == pytest.approx(1, abs=0.03) for level in row["levels"])
    assert row["value"] == pytest.approx(sum(each["loss"] for each in row["levels"]) / 5)
    # Of another, s^4 sigma^2 + sigma^4 v over (s^2 + sigma^2)^2: its noise and its shrinkage.
    worse, variance = measure(held, Losses(count=40), Wiener(0.1), (0.02, 50.0)), held.sigma_data**2
    for level in worse["levels"]:
        square = level["sigma"] ** 2
        expected = (1e-4 * square + square**2 * variance) / (0.01 + square) ** 2
        assert level["error"] == pytest.approx(expected, abs=4 * level["standard_error"])


def _measured(rank, world_size, batch_size):
    torch.manual_seed(0)
    held = open_held_out(Losses(count=75), Synthetic(90, 16).open(), Synthetic(99, 16, 1), PLAIN)
    row = measure(
        held, Losses(levels=3), Denoiser(Smooth(), Karras(0.5)), (0, 99), batch_size=batch_size
    )
    return {"value": row["value"], "error": row["standard_error"], "levels": row["levels"]}


def test_any_number_of_ranks_measures_the_same_bits():
    alone = _measured(0, 1, 250)
    for each in started.answers(_measured, 2, 250):
        assert each == alone
    # Other batches change the last digits of a convolution alone.
    assert _measured(0, 1, 7)["value"] == pytest.approx(alone["value"], rel=1e-6)


def test_without_other_images_the_last_of_the_training_are_measured_and_said_to_be_trained_on():
    training = Synthetic(50, 16).open()
    held = open_held_out(Losses(count=12), training, None, PLAIN)
    assert torch.equal(held.images, training.read(torch.arange(38, 50)))
    assert (held.held_out, held.which, held.name) == (False, "the last 12 of 50", training.name)
    named = open_held_out(Losses(count=12), training, Synthetic(50, 16), PLAIN)
    assert not named.held_out  # the same images by another way


def test_a_data_set_s_own_held_out_images_are_none_that_are_trained_on():
    source = Synthetic(300, 16)
    training = source.open()
    held = open_held_out(Losses(count=64), training, source.validation(), PLAIN)
    seen = {image.numpy().tobytes() for image in training.read(torch.arange(300))}
    assert len(held.images) == 64
    assert not any(image.numpy().tobytes() in seen for image in held.images)
    assert held.held_out and held.name == f"{training.name}-held-out"
    assert CIFAR10().validation() == CIFAR10(split="test")
    assert CIFAR10(split="test").validation() is None


def test_a_folder_s_own_are_its_images_for_validation(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.png").write_bytes(b"")
    assert ImageFolder(str(tmp_path), 16, split="train").validation().split == "val"
    (tmp_path / "val" / "a.png").unlink()
    assert ImageFolder(str(tmp_path), 16, split="train").validation().split == "test"
    assert ImageFolder(str(tmp_path), 16).validation() is None


def test_conditions_go_with_their_images():
    training, other = Synthetic(50, 16).open(), Synthetic(80, 16, 1)
    network = SimpleNamespace(classes=8, text_width=0, image_channels=3)
    held = open_held_out(Losses(count=10), training, other, network, Downsampled(2))
    indices = torch.arange(10) * 8
    assert torch.equal(held.condition["label"], other.open().labels[indices])
    assert torch.equal(held.images, other.open().read(indices))
    assert held.condition["source"].shape == (10, 3, 16, 16)
    few = Synthetic(80, 16, 1, shapes=("disc", "heart", "cross"))
    with pytest.raises(UserError, match="has 3 classes, and the model 8"):
        open_held_out(Losses(count=10), training, few, network, Downsampled(2))
    with pytest.raises(UserError, match="evaluation.losses: the images of"):
        open_held_out(Losses(), _grey(training), other, PLAIN)


def _grey(images):
    """The first channel alone."""
    store = images.read(torch.arange(len(images)))[:, :1]
    return dataclasses.replace(images, store=store)


def test_a_held_out_loss_is_no_evaluation(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    history.measure(16, [{"name": "loss@4/x", "value": 1.0, "levels": [], "weights": w}
                         for w in ("ema", "denoiser")])  # fmt: skip
    assert not history.measured(16)
    history.measure(16, [{"name": "fd@4/x/shapes", "value": 1.0}])
    assert history.measured(16)
    assert [row.get("weights") for row in history.rows()] == ["ema", "denoiser", None]


def test_numbers_out_of_range_are_refused():
    for words in ({"every": 0}, {"count": 1}, {"levels": 1}):
        with pytest.raises(UserError, match="must be at least"):
            Losses(**words)


def with_losses(made, **words):
    losses = Losses(**({"every": 16, "count": 10, "levels": 3} | words))
    return dataclasses.replace(made, evaluation=dataclasses.replace(made.evaluation, losses=losses))


def varied():
    """A run in which dropout, several resolutions and labels go into the weights."""
    data = DataConfig(Synthetic(40, 16), batch_size=16, resolution_weights={8: 1, 16: 1})
    return experiment(network=network(classes=8, dropout=0.3), data=data)


@pytest.mark.slow
def test_training_with_it_has_the_bits_of_training_without(go):  # noqa: F811
    _, without = go(varied(), "without")
    folder, trained = go(with_losses(varied()), "with")
    same(without, trained)
    rows = [row for row in History(folder / "metrics.jsonl").rows() if is_held_out(row)]
    assert [(row["images"], row["weights"]) for row in rows] == [
        (images, weights) for images in (16, 32, 48) for weights in ("ema", "denoiser")
    ]
    assert all(row["held_out"] and "commit" in row for row in rows)
    assert rows[4]["value"] != rows[5]["value"] and rows[0]["ema"]
    # What was stopped and goes on has the same rows.
    before = measurements(folder)
    Path(checkpoints.latest(folder / "checkpoints")).unlink()
    again = checkpoints.found(folder / "checkpoints")[-1]
    checkpoints.point_to(again)
    _, resumed = go(with_losses(varied()), "with")
    same(without, resumed)
    assert measurements(folder) == before
