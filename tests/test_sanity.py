"""Numbers that are not sane: a gradient without a value, a spike, fp16's steps left out."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from test_training import experiment, go, network  # noqa: F401 - a fixture
from torch import nn

from diffusion_pl.diffusion.objective import pixel_mean
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History
from diffusion_pl.training.sanity import NonFiniteError, Spikes
from diffusion_pl.training.totals import Totals


class Steep(nn.Module):
    """Its output is finite; from the third pass on its gradient is not: a root at 0."""

    classes, channels = 0, 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.root = nn.Parameter(torch.tensor(1.0))
        self.calls = 0

    def check_resolution(self, height, width):
        pass

    def forward(self, x, c_noise):
        self.calls += self.training
        return x * self.weight + (self.root * (self.calls < 3)).sqrt()


def test_a_gradient_without_a_value_stops_the_run_before_the_weights(go, tmp_path):  # noqa: F811
    made = experiment(network=Steep(), settings={"dropout": {"label": 0.0}, "checkpoint_every": 8})
    complaint = r"gradient's norm is (inf|nan) at step 2, 16 images; images 16 to 23"
    with pytest.raises(NonFiniteError, match=complaint) as error:
        go(made)
    assert error.value.step == 2
    kept = checkpoints.load(checkpoints.latest(tmp_path / "run" / "checkpoints"))
    assert kept["diffusion_pl"]["images"] == 16
    assert all(torch.isfinite(value).all() for value in kept["state_dict"].values())


def test_the_logged_gradient_is_the_norm_before_it_is_clipped(go):  # noqa: F811
    # Plain descent: the first weights and those after a step give the gradient that was taken.
    rate, clip = 0.5, 1e-3
    settings = {"grad_clip": clip, "dropout": {"label": 0.0}, "log_every": 8, "total_images": 8}
    made = experiment(
        8,
        network=network(dropout=0.0, classes=8),
        optimizer=partial(torch.optim.SGD, lr=rate),
        lr_schedule=None,
        settings=settings,
    )
    before = {name: value.clone() for name, value in made.network.state_dict().items()}
    folder, after = go(made)
    moved = [
        after["state_dict"][f"denoiser.network.{name}"] - value for name, value in before.items()
    ]
    length = torch.cat([step.flatten() for step in moved]).norm()
    row = next(row for row in History(folder / "metrics.jsonl").rows() if "loss" in row)
    assert row["gradient_norm"] > 10 * clip
    assert float(length) == pytest.approx(rate * clip, rel=1e-3)


def test_fp16_measures_and_clips_the_gradient_and_not_its_scaled_double(go):  # noqa: F811
    # A mean over pixels, so that nothing overflows; plain descent, so that weights show the clip.
    norms, weights = {}, {}
    for precision in ("fp32", "fp16"):
        settings = {"grad_clip": 1e-3, "precision": precision, "log_every": 8}
        made = experiment(
            16,
            objective=dataclasses.replace(EDM(), reduce=pixel_mean),
            optimizer=partial(torch.optim.SGD, lr=1.0, fused=True),
            lr_schedule=None,
            settings=settings,
        )
        folder, after = go(made, precision)
        rows = [row for row in History(folder / "metrics.jsonl").rows() if "loss" in row]
        norms[precision] = [row["gradient_norm"] for row in rows]
        weights[precision] = after["state_dict"]["denoiser.network.out_conv.weight"]
    assert rows[0]["loss_scale"] == 2.0**16
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.05)
    torch.testing.assert_close(weights["fp16"], weights["fp32"], rtol=0.05, atol=1e-5)


def test_fp16_says_when_it_leaves_a_step_out(go, capsys):  # noqa: F811
    # EDM's loss is a sum over pixels: some 1e3, times 2^16 beyond half precision on the way back.
    settings = {"precision": "fp16", "log_every": 8, "dropout": {"label": 0.0}}
    folder, after = go(experiment(24, settings=settings))
    rows = [row for row in History(folder / "metrics.jsonl").rows() if "loss" in row]
    assert rows[0]["loss_scale"] == 2.0**15
    said = (
        "8 images: fp16 left out steps whose gradient overflowed; the scale of its loss went from"
    )
    assert said in capsys.readouterr().err
    left_out = 16 - math.log2(rows[-1]["loss_scale"])
    assert after["optimizer_states"][0]["state"][0]["step"] == 3 - left_out


def test_a_loss_twice_the_median_of_the_rows_before_is_a_spike():
    spikes = Spikes()
    assert [spikes.note(loss) for loss in (1.0, 9.0, 1.1, 0.9, 1.0)] == [None] * 5
    assert spikes.note(1.9) is None
    # The median of 1, 9, 1.1, 0.9, 1 and 1.9.
    assert spikes.note(2.2) == "the loss rose to 2.2; the median of the rows before is 1.05"
    # Ten rows are remembered: of the first ones nothing is left.
    for _ in range(10):
        spikes.note(100.0)
    assert spikes.note(150.0) is None


def test_totals_are_means_over_the_steps_and_go_on_from_a_checkpoint():
    straight, stopped = Totals(), Totals()
    numbers = [torch.tensor(number) for number in (1.0, 2.0, 6.0)]
    for number in numbers:
        straight.add(loss=number)
        straight.steps += 1
    for number in numbers[:2]:
        stopped.add(loss=number)
        stopped.steps += 1
    resumed = Totals()
    resumed.restore(stopped.state())
    resumed.add(loss=numbers[2])
    resumed.steps += 1
    assert straight.read() == resumed.read() == {"loss": 3.0}
    assert straight.state() == {"steps": 0, "sums": {}}


def test_sums_of_another_number_of_ranks_go_on_from_their_mean():
    totals = Totals()
    totals.restore({"steps": 2, "sums": {"loss": torch.tensor([2.0, 4.0])}})
    assert totals.read() == {"loss": 1.5}
