"""`import lucidrains`: a milestone of denoising_diffusion_pytorch, against that package's outputs.

`reference_lucidrains.pt` holds the state dict of a random GaussianDiffusion of version 2.3.4 (Unet
of dim 8, multipliers 1 and 2, 2 heads of 4; image_size 8, 10 timesteps, pred_v, sigmoid), its
network's answer to `x` and `t`, and the images of its `p_sample_loop` for the noise in `noise`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion_pl.cli import main
from diffusion_pl.commands import parts, runs
from diffusion_pl.diffusion.timesteps import CosineBetas, LinearBetas
from diffusion_pl.interop import lucidrains


@pytest.fixture
def reference():
    return torch.load(Path(__file__).parent / "reference_lucidrains.pt", weights_only=True)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def milestone(state, raw=None, **more):
    """The file that the package's Trainer.save writes."""
    average = {f"ema_model.{key}": value for key, value in state.items()}
    average |= {"initted": torch.tensor(True), "step": torch.tensor(10)}
    average |= {f"online_model.{key}": value for key, value in (raw or state).items()}
    content = {"step": 10, "model": raw or state, "opt": {"state": {}, "param_groups": []},
               "ema": average, "scaler": None, "version": "2.3.4"} | more  # fmt: skip
    torch.save(content, "model-1.pt")


def imported(*more):
    words = ["import", "lucidrains", "model-1.pt", "runs/x", "--set", "image_size=8", *more]
    assert main(words) == 0
    model = runs.open_model(Path("runs/x"))
    return model, parts.sampler_of(model.config, model.objective)


def refused(capsys, *more):
    assert main(["import", "lucidrains", "model-1.pt", "runs/x", *more]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@torch.no_grad()
def test_a_milestone_gives_the_packages_answer_and_images(reference):
    milestone(reference["state"])
    model, sampler = imported()
    answer = model.denoiser.network(reference["x"], reference["t"].double())
    torch.testing.assert_close(answer, reference["F"], rtol=1e-4, atol=1e-5)
    noise = iter(reference["noise"][1:])
    image = sampler(model.denoiser, reference["noise"][0], lambda like: next(noise))
    torch.testing.assert_close(image, reference["image"], rtol=0, atol=1e-4)
    assert main(["sample", "runs/x", "--count", "1"]) == 0


def test_the_average_is_taken_and_the_raw_weights_on_demand(reference, capsys):
    raw = {key: 2 * value if key.startswith("model.") else value
           for key, value in reference["state"].items()}  # fmt: skip
    milestone(reference["state"], raw)
    model, _ = imported()
    assert "averaged" in capsys.readouterr().out
    stem = reference["state"]["model.init_conv.weight"]
    assert torch.equal(model.denoiser.network.stem.weight, stem)
    assert main(["import", "lucidrains", "model-1.pt", "runs/raw", "--set", "image_size=8",
                 "--weights", "raw"]) == 0  # fmt: skip
    other = runs.open_model(Path("runs/raw")).denoiser.network
    assert torch.equal(other.stem.weight, 2 * stem)
    assert "raw" in capsys.readouterr().out


@pytest.mark.parametrize("table", [CosineBetas(20), LinearBetas(1000), LinearBetas(50, 2e-3, 0.4)])
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("predicted", ["noise", "image", "velocity"])
def test_the_weights_of_the_loss_tell_the_prediction(reference, table, gamma, predicted):
    """Hang 2023, arXiv:2303.09556, with clipped snr s': s' / snr, s', s' / (1 + snr)."""
    snr = 1 / table.sigmas().square()
    clipped = snr if gamma is None else snr.clamp(max=gamma)
    weight = {"noise": clipped / snr, "image": clipped, "velocity": clipped / (1 + snr)}[predicted]
    state = reference["state"] | {
        "betas": table.betas.float(), "alphas_cumprod": (snr / (1 + snr)).float(),
        "loss_weight": weight.float(),
    }  # fmt: skip
    milestone(state)
    config, _ = lucidrains.read(Path("model-1.pt"), {"image_size": 8})
    assert config[lucidrains.FROM_WEIGHTS]["predict"] == predicted
    node = lucidrains.nodes(config)["objective"]["schedule"]
    betas = node.get("betas") or LinearBetas(node["T"], node["beta_1"], node["beta_T"]).betas
    torch.testing.assert_close(torch.as_tensor(betas).float(), table.betas.float())


def test_what_is_not_understood_is_named(reference, capsys):
    state = reference["state"]
    milestone(state)
    assert "image_size" in refused(capsys)
    size = ("--set", "image_size=8")
    assert "colour" in refused(capsys, *size, "--set", "colour=1")
    for key, value, named in [
        ("model.time_mlp.0.weights", torch.ones(4), "sinusoids"),
        ("model.init_conv.weight", torch.ones(8, 6, 7, 7), "self_condition"),
        ("model.more.weight", torch.ones(1), "model.more.weight"),
        ("model.mid_block1.mlp.1.bias", torch.ones(3), "model.mid_block1.mlp.1.bias"),
        ("loss_weight", torch.full((10,), 7.0), "loss_weight"),
    ]:
        milestone(state | {key: value})
        assert named in refused(capsys, *size)
    old = {key.replace("norm.g", "norm.weight"): value for key, value in state.items()}
    milestone(old)
    assert "downs.0.0.block1.norm.g" in refused(capsys, *size)
    torch.save({"w": torch.ones(1)}, "model-1.pt")
    assert "no milestone" in refused(capsys, *size)
