"""`train --from`: the weights of another run, held against what they were trained for."""

from __future__ import annotations

from pathlib import Path

import homes
import pytest
import torch
from test_commands_models import TINY

from diffusion_pl.cli import main
from diffusion_pl.commands import parts, runs, starting
from diffusion_pl.commands.options import TrainOptions
from diffusion_pl.training import checkpoint as checkpoints

TABLE = "T: 20, beta_1: 1e-3, beta_T: 0.4"
FIVE = ("data.dataset.shapes=[disc, heart, triangle, square, star]", "network.classes=5")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of 8 classes, and one of none."""
    plain = ("network.classes=0", "trainer.dropout.label=0", "trainer.total_images=8")
    words = (*plain, "--run", "runs/plain")
    return homes.trained(tmp_path_factory.mktemp("home"), TINY, words)


@pytest.fixture(autouse=True)
def there(home, monkeypatch):
    monkeypatch.chdir(home)


def start(*overrides, run="runs/tiny", **consent):
    return starting.load_weights(
        Path(run), parts.read("tiny", overrides), TrainOptions(**consent), True
    )


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (("objective.predict=velocity",), "at sigma 10.5 c_skip was 1, here 0.009008"),
        (("objective.predict=image",), "c_skip was 1, here 0"),
        (("objective={_target_: diffusion_pl.objectives.edm.EDM}",), "objective._target_: "),
        (("objective.T=40",), "c_noise was"),
        (("objective.beta_T=0.3",), "c_noise was"),
        (("objective={_target_: diffusion_pl.objectives.improved_ddpm.ImprovedDDPMSimple, T: 20}",),
         "c_noise was"),
        (("network.groups=2",), "network.groups: 4 -> 2"),
    ],
)  # fmt: skip
def test_weights_of_another_objective_or_network_are_refused(overrides, what, capsys):
    with pytest.raises(ValueError, match="its weights were trained for something else") as raised:
        start(*overrides)
    assert what in str(raised.value) and "--accept-differences" in str(raised.value)
    assert "\n" not in str(raised.value)
    start(*overrides, accept_differences=True)
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((), ""),
        (("network.dropout=0.3", "trainer.total_images=8", "seed=3"), ""),
        (("network.heads=1",), ""),  # what it is without a word
        (("objective.predict=noise",), "objective.predict: absent -> \"noise\""),
        (("objective.weight={_target_: diffusion_pl.diffusion.weights.X0Weight}",),
         "objective.weight._target_: absent -> "),
        ((f"objective={{_target_: diffusion_pl.objectives.ddpm.DDPMBound, {TABLE}}}",),
         "objective._target_: "),
    ],
)  # fmt: skip
def test_what_the_weights_are_of_may_be_trained_otherwise(overrides, told, capsys):
    found = start(*overrides)
    assert not found.fresh
    err = capsys.readouterr().err
    assert (told in err and "trained otherwise" in err) if told else not err


def test_a_start_is_from_the_average():
    found, average = start().state, weights("runs/tiny")
    assert found.keys() == average.keys()
    assert all(torch.equal(found[key], value) for key, value in average.items())
    raw = checkpoints.load(runs.checkpoint_of(Path("runs/tiny")))["state_dict"]
    assert any(not torch.equal(raw[f"denoiser.{key}"], average[key]) for key in average)


def test_as_many_classes_can_begin_anew_too():
    found = start(fresh_labels=True)
    assert found.fresh and all("label" in key for key in found.fresh)
    assert not found.fresh & found.state.keys()


def test_another_sigma_data_is_another_denoiser(tmp_path, monkeypatch):
    """Two EDMs of one name: their c's differ."""
    karras = "{_target_: diffusion_pl.objectives.edm.EDM, sigma_data: 0.5}"
    words = (f"objective={karras}", "trainer.total_images=8", "--run", "runs/edm")
    assert main(["train", "tiny", *words]) == 0
    with pytest.raises(ValueError, match="objective.sigma_data: 0.5 -> 0.6: at sigma .* was"):
        start(f"objective={karras.replace('0.5', '0.6')}", run="runs/edm")
    start(f"objective={karras[:-1]}, P_mean: -0.4}}", run="runs/edm")


def test_a_refused_start_claims_no_folder(capsys):
    words = [
        "train",
        "tiny",
        "objective.predict=velocity",
        "--from",
        "runs/tiny",
        "--run",
        "runs/v",
    ]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "was trained" not in err and "were trained for" in err
    assert not Path("runs/v").exists()
    assert main(["train", "tiny", "--fresh-labels", "--run", "runs/v"]) == 2
    assert "each needs --from RUN" in capsys.readouterr().err
    assert main([*words, "--accept-differences", "trainer.total_images=8"]) == 0


def weights(folder):
    loaded = checkpoints.load(runs.checkpoint_of(Path(folder)))["state_dict"]
    return {key[4:]: value for key, value in loaded.items() if key.startswith("ema.")}


@pytest.mark.parametrize(
    ("overrides", "run", "said"),
    [(FIVE, "runs/tiny", "it was trained on 8 classes, this network has 5"),
     ((), "runs/plain", "it was trained on 0 classes, this network has 8"),
     (("network.classes=0", "trainer.dropout.label=0"), "runs/tiny",
      "it was trained on 8 classes, this network has 0")],
)  # fmt: skip
def test_other_classes_begin_their_labels_anew_where_that_is_asked_for(overrides, run, said):
    with pytest.raises(ValueError, match=f"{said}; initialise the labels.*--fresh-labels"):
        start(*overrides, run=run)
    found = start(*overrides, run=run, fresh_labels=True)
    wanted = parts.meta_network(parts.read("tiny", overrides)).state_dict()
    then = weights(run)
    assert {f"network.{key}" for key in wanted} == {*found.state, *found.fresh}
    for key, value in found.state.items():
        assert torch.equal(value, then[key])
    labelled = {key for key in found.fresh if "label" in key}
    assert labelled == found.fresh and bool(labelled) == ("network.classes=0" not in overrides)


def test_a_model_of_three_classes_more_is_trained_on_from_the_other_weights(capsys):
    words = ["train", "tiny", *FIVE, "trainer.total_images=8", "optimizer.lr=1e-12"]
    assert main([*words, "--from", "runs/tiny", "--fresh-labels", "--run", "runs/five"]) == 0
    then, now = weights("runs/tiny"), weights("runs/five")
    others = {key for key in now if "label" not in key}
    for key in others:
        torch.testing.assert_close(now[key], then[key], rtol=0, atol=1e-6)
    assert others != set(now)
    for key in set(now) - others:
        assert 5 in now[key].shape
