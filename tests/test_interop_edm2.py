"""EDM2's files as the released code writes them: read, refused or asked about, and never run."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import prepared
import pytest
import torch
from test_edm2_unet import CONFIG, OTHER, filled
from test_interop_edm import EasyDict, Persistent, attributes, packages  # noqa: F401

from diffusion_pl.cli import main
from diffusion_pl.commands import runs
from diffusion_pl.interop import edm, edm2
from diffusion_pl.interop.denoisers import denoiser_from

# What the file's class is not told.
ABOUT = ("precond", "encoder", "P_mean", "P_std")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, packages):  # noqa: F811
    monkeypatch.chdir(tmp_path)


def weights(config):
    """All that the published class stores, float32."""
    more = {
        "logvar_fourier.freqs": torch.randn(128), "logvar_fourier.phases": torch.rand(128),
        "logvar_linear.weight": torch.randn(1, 128),
    }  # fmt: skip
    return {key: value.float() for key, value in filled(config).items()} | more


def objects(config, *, encoder="StandardRGBEncoder", loss=True, network="UNet"):
    """The content of a network pickle."""
    kwargs = {key: value for key, value in config.items() if key not in ABOUT}
    state = weights(config)
    unet = {key.removeprefix("unet."): value for key, value in state.items() if "unet" in key}
    own = {key: value for key, value in kwargs.items() if key != "sigma_data"}
    top = attributes({}, "", kwargs | {"use_fp16": True})
    top["_modules"] = OrderedDict(unet=Persistent(network, attributes(unet, "", own)))
    for name in ("logvar_fourier", "logvar_linear"):
        inside = {key.removeprefix(f"{name}."): value for key, value in state.items()
                  if key.startswith(name)}  # fmt: skip
        top["_modules"][name] = Persistent("MPFourier", attributes(inside, ""))
    content = EasyDict(dataset_kwargs=EasyDict(path="a.zip"), ema=Persistent("Precond", top))
    if encoder:
        scale = {"scale": np.ones(4, np.float32)} if "VAE" in encoder else {}
        content["encoder"] = Persistent(encoder, scale | {"_init_args": (), "_init_kwargs": {}})
    if loss:
        numbers = {key: config[key] for key in ("P_mean", "P_std", "sigma_data")}
        content["loss_fn"] = Persistent("EDM2Loss", numbers)
    return content


def pickled(config, **options):
    Path("network.pkl").write_bytes(pickle.dumps(objects(config, **options)))
    return Path("network.pkl")


def state(config, lengths=(0.05, 0.1)):
    """A training state: the raw weights, and averages that are multiples of them."""
    raw = OrderedDict(weights(config))
    emas = [OrderedDict((key, (2 + n) * value) for key, value in raw.items())
            for n, _ in enumerate(lengths)]  # fmt: skip
    content = {
        "state": EasyDict(cur_nimg=2048, total_elapsed_time=1.5),
        "net": raw,
        "loss_fn": {"P_mean": -0.8, "P_std": 1.6, "sigma_data": 0.5, "_init_kwargs": {}},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.01, "betas": (0.9, 0.99)}]},
        "ema": {"stds": list(lengths), "emas": emas},
    }
    torch.save(content, "training-state.pt")
    return Path("training-state.pt")


@pytest.mark.parametrize("config", [CONFIG, OTHER], ids=["usual", "other"])
def test_a_network_pickle_says_all_of_the_experiment(config):
    found, read = edm.read(pickled(config))
    assert edm.asked(found) is None
    assert {key: found[key] for key in config} == config
    assert edm.read(Path("network.pkl"), {"dropout": 0.5})[0]["dropout"] == 0.5
    nodes = edm.nodes(found)
    objective = {"P_mean": -0.8, "P_std": 1.6, "sigma_data": config["sigma_data"], "channels": 128}
    assert nodes["objective"] == {"_target_": "diffusion_pl.objectives.edm2.EDM2", **objective}
    assert nodes["sampler"]["steps"] == 32 and nodes["label_dropout"] == 0
    mine, published = edm2.weights(config, filled(config)), edm.weights(found, read)
    assert mine.keys() == published.keys()
    for key, value in mine.items():
        assert torch.equal(value.float(), published[key]), key


@torch.no_grad()
def test_an_imported_network_samples_is_tuned_and_guides(capsys):
    path = pickled(CONFIG | {"label_dim": 2})
    assert main(["import", "edm", str(path), "runs/mine"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "learned weight of the loss is not taken" in result["notes"][0]
    denoiser = runs.open_model(Path("runs/mine")).denoiser
    x, sigma, label = torch.randn(2, 3, 8, 8), torch.tensor([0.4, 3.0]), torch.tensor([1, -1])
    expected = denoiser_from(edm, *edm.read(path))(x, sigma, label=label)
    torch.testing.assert_close(denoiser(x, sigma, label=label), expected)
    words = ["--count", "1", "--steps", "2"]
    assert main(["sample", "runs/mine", *words]) == 0
    assert json.loads(capsys.readouterr().out)["evaluations"] == 3
    # Labels were never hidden, so the model alone does not guide itself; another run may.
    guided = [*words, "--guidance", "2", "--out", "guided"]
    assert main(["sample", "runs/mine", *guided]) == 2
    assert "trainer.dropout.label" in capsys.readouterr().err
    assert main(["sample", "runs/mine", *guided, "--guide", "runs/mine"]) == 0
    assert json.loads(capsys.readouterr().out)["evaluations"] == 6
    prepared.fill(Path("photos"), prepared.files(8, 8, 8))
    settings = ["data.dataset.path=photos", "data.batch_size=4", "trainer.total_images=8",
                "trainer.checkpoint_every=8", "trainer.accelerator=cpu", "trainer.loggers=[]",
                "features.name=shapes", "evaluation.metrics=[]", "evaluation.count=2",
                "sampler.steps=2"]  # fmt: skip
    tune = ["runs/mine/config.yaml", "--from", "runs/mine", "--run", "runs/tuned"]
    with torch.enable_grad():
        assert main(["train", *tune, *settings]) == 0


def test_a_training_state_gives_the_average_that_is_said_or_the_raw_weights(capsys):
    path, raw = state(CONFIG), edm2.weights(CONFIG, filled(CONFIG))
    said = {"dropout": 0.2, "channels_per_head": 8}
    for words, weights, factor in (
        ({"ema_std": 0.05}, "ema", 2),
        ({"ema_std": 0.1}, "ema", 3),
        ({}, "raw", 1),
    ):
        found, read = edm.read(path, said | words, weights)
        assert edm.asked(found) is None
        network = edm.nodes(found)["network"]
        usual = edm.nodes(CONFIG)["network"] | {"noise_mult": 1, "embedding_mult": 2}
        assert network == usual
        for key, value in edm.weights(found, read).items():
            by = 1 if "unet.emb_fourier" in key else factor
            torch.testing.assert_close(value, by * raw[key].float())
    assert edm.notes(edm.read(path, said, "raw")[0])[0] == "raw weights of a training state"
    with pytest.raises(ValueError, match=r"ema_std: must be .*\[0.05, 0.1\] \(got 0.2\)"):
        edm.read(path, {"ema_std": 0.2})
    with pytest.raises(ValueError, match=r"--set ema_std=0.05, or take --weights raw"):
        edm.read(path)
    assert "--set dropout=0.0" in edm.asked(edm.read(path, {"ema_std": 0.05})[0])
    assert main(["import", "edm", str(path), "runs/x", "--weights", "raw"]) == 2
    error = capsys.readouterr().err
    assert "training-state.pt: dropout: a training state does not say it" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("average", [None, {"stds": [], "emas": []}])
def test_a_state_without_averages_is_named(average):
    content = torch.load(state(CONFIG), weights_only=False)
    content["ema"] = average
    torch.save(content, "none.pt")
    with pytest.raises(ValueError, match="keeps no average; take --weights raw"):
        edm.read(Path("none.pt"))
    assert edm.read(Path("none.pt"), {}, "raw")[1].keys() == weights(CONFIG).keys()


@pytest.mark.parametrize("options", [{}, {"loss": False}])
def test_latents_of_a_second_network_are_refused_by_its_name(capsys, options):
    path = pickled(CONFIG | {"img_channels": 4}, encoder="StabilityVAEEncoder", **options)
    assert main(["import", "edm", str(path), "runs/x"]) == 2
    error = capsys.readouterr().err
    assert "encoder: needs a second network" in error and "'StabilityVAEEncoder'" in error
    assert error.count("\n") == 1 and not Path("runs/x").exists()


def test_four_channels_that_may_be_latents_are_asked_about(capsys):
    path = pickled(CONFIG | {"img_channels": 4}, encoder=None)
    assert main(["import", "edm", str(path), "runs/x"]) == 2
    assert "--set encoder=StandardRGBEncoder" in capsys.readouterr().err
    words = ["--set", "encoder=StandardRGBEncoder"]
    assert main(["import", "edm", str(path), "runs/x", *words]) == 0


def test_noise_levels_that_no_loss_says_are_asked_for(capsys):
    path = pickled(CONFIG, loss=False)
    assert main(["import", "edm", str(path), "runs/x"]) == 2
    assert "P_mean: it does not say the noise levels" in capsys.readouterr().err
    words = ["--set", "P_mean=-0.4", "--set", "P_std=1.0"]
    assert main(["import", "edm", str(path), "runs/x", *words]) == 0
    capsys.readouterr()
    assert "P_mean: -0.4" in Path("runs/x/config.yaml").read_text()


def test_raw_weights_of_a_pickle_and_another_network_in_it_are_refused():
    with pytest.raises(ValueError, match="network.pkl: holds an average alone"):
        edm.read(pickled(CONFIG), {}, "raw")
    with pytest.raises(ValueError, match=r"must be a UNet \(got 'DiT'\)"):
        edm.read(pickled(CONFIG, network="DiT"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_frequencies": 2}, "position_frequencies: is no argument of EDM2's Precond"),
        ({"img_resolution": "8"}, "img_resolution: must be a whole number"),
        ({"label_dim": 10**12}, "label_dim: must be a whole number"),
        ({"channel_mult": [1] * 17}, "channel_mult: must be a list of 1 to 16"),
        ({"num_blocks": 10**5}, "num_blocks: must be a whole number"),
        ({"res_balance": 1.5}, "res_balance: must be a positive number"),
        ({"clip_act": "256"}, "clip_act: must be a positive number"),
        ({"P_std": 0}, "P_std: must be a positive number"),
        ({"dropout": "0.1"}, "dropout: must be a number"),
        ({"attn_resolutions": 16}, "attn_resolutions: must be a list"),
        ({"channels_per_head": 0}, "channels_per_head: must be a whole number"),
        ({"num_blocks": 2}, r"unet.enc.8x8_block1.emb_gain: is missing|block1.*is missing"),
        ({"model_channels": 16}, r"has shape \(.*\), not \("),
        ({"attn_resolutions": []}, "attn_proj.weight: is not in the network"),
        ({"label_dim": 0}, "unet.emb_label.weight: is not in the network"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_its_first_key(change, message):
    state = {key: value.float() for key, value in filled(CONFIG).items()}
    with pytest.raises(ValueError, match=message) as caught:
        denoiser_from(edm, CONFIG | change, state)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_weights_of_another_layout_are_told_from_edm2s():
    with pytest.raises(ValueError, match="not in EDM2's layout"):
        edm2.config_of_weights({"unet.enc.8x8_conv.weight": torch.zeros(8, 4, 3, 3)})
    odd = filled(CONFIG) | {"unet.emb_noise.weight": torch.zeros(9, 8)}
    with pytest.raises(ValueError, match="no multiples of the first level's"):
        edm2.config_of_weights(odd)
