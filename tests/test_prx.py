"""PRX over pixels: the published numbers, and what is imported of it."""

from __future__ import annotations

import json
from pathlib import Path

import homes
import numpy as np
import pytest
import torch
from published import Fixture
from safetensors.torch import save_file
from worded import minilm_or_skip

import diffusion_pl as dp
from diffusion_pl import config
from diffusion_pl.cli import main
from diffusion_pl.diffusion.guidance import VelocityClamp, guided
from diffusion_pl.diffusion.paths import Along
from diffusion_pl.diffusion.spacings import EqualSteps
from diffusion_pl.errors import UserError
from diffusion_pl.interop import prx
from diffusion_pl.networks.prx import PRX
from diffusion_pl.objectives.jit import JiT as Objective
from diffusion_pl.objectives.rectified_flow import Straight
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.sampler import Sampler


@pytest.fixture
def fixture(parity):
    return Fixture(parity / "prx_pixel.npz")


@pytest.fixture
def denoiser(fixture):
    made = prx.denoiser_from(fixture.config, fixture.weights)
    made.network.set_null_text(fixture["null_text"][0], fixture["null_text_mask"][0])
    return made


@pytest.fixture
def text(fixture):
    return {"text": fixture["text"], "text_mask": fixture["text_mask"]}


def close(found, published):
    torch.testing.assert_close(found, published, rtol=1e-5, atol=1e-5)


def noisy(fixture, of="yn"):
    sigma = fixture["sigma"][:, None, None, None]
    return fixture["x"] * sigma if of == "x" else fixture["y"] + fixture["noise"] * sigma


def test_the_network_gives_the_published_output(fixture, denoiser, text):
    close(denoiser.network(fixture["x"], fixture["c_noise"], **text), fixture["out/raw_output"])


def test_the_denoiser_gives_the_published_outputs(fixture, denoiser, text):
    sigma = fixture["sigma"]
    close(denoiser(noisy(fixture, "x"), sigma, **text), fixture["out/denoised_x"])
    close(denoiser(noisy(fixture), sigma, **text), fixture["out/denoised_yn"])


def test_no_text_is_the_published_null(fixture, denoiser, text):
    nobody = text | {"text_mask": torch.zeros_like(text["text_mask"])}
    for condition in ({}, {"text": None, "text_mask": None}, nobody):
        found = denoiser(noisy(fixture), fixture["sigma"], **condition)
        close(found, fixture["out/denoised_yn_null"])


def test_other_numbers_under_the_mask_give_the_same(fixture, denoiser, text):
    other = torch.where(text["text_mask"][..., None], text["text"], 1e4)
    found = denoiser(noisy(fixture), fixture["sigma"], text=other, text_mask=text["text_mask"])
    close(found, fixture["out/denoised_yn_other_padding"])


def test_the_loss_is_the_published_one(fixture, denoiser, text):
    scale, t_eps = fixture.config["noise_scale"], fixture.config["t_eps"]
    objective = Objective(noise_scale=scale, t_eps=t_eps, reversed_time=True)
    error = denoiser(noisy(fixture), fixture["sigma"], **text) - fixture["y"]
    weight = objective.weight(fixture["sigma"].double()).float()[:, None, None, None]
    found = (weight * error.square()).mean(dim=(1, 2, 3))
    published = fixture["out/weighted_sq_error"].mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, published, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["euler_10", "euler_10_guided"])
def test_trajectories_end_where_the_published_ones_do(name, fixture, denoiser, text):
    config = fixture.config
    weight = config["guidance"] if name.endswith("guided") else 1.0
    condition = {key: value[:2] for key, value in text.items()}
    denoise = guided(denoiser, condition=condition, weight=weight)
    scale = config["noise_scale"]
    sampler = Sampler(
        euler, Along(Straight(scale), 0.0, 1.0), config["steps"], EqualSteps(),
        velocity_clamp=VelocityClamp(config["t_eps"], scale),
    )  # fmt: skip
    found = sampler(denoise, fixture["latents"], torch.randn_like)
    torch.testing.assert_close(found, fixture[f"out/{name}"], rtol=1e-4, atol=1e-4)


def test_the_first_output_of_a_new_network_is_0():
    """Its head and what modulates it begin at 0, and so does each block's part (adaLN-Zero)."""
    network = PRX(16, 6, 4, patch_size=4, width=16, depth=2, heads=2, bottleneck=0)
    x, c_noise, mask = torch.randn(2, 3, 16, 16), torch.rand(2), torch.ones(2, 4).bool()
    assert not network(x, c_noise, text=torch.randn(2, 4, 6), text_mask=mask).any()
    for block in network.blocks:
        assert not block.affine.weight.any() and not block.affine.bias.any()
    assert not network.affine.weight.any() and not network.affine.bias.any()


# Of diffusers' own making.


def theirs(folder, *, pipeline=True, **more):
    """A tiny network of diffusers', saved as it saves one."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    usual = {"context_in_dim": 24, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]}
    network = diffusers.PRXTransformer2DModel(
        in_channels=3, patch_size=4, hidden_size=32, mlp_ratio=2.5, **(usual | more)
    ).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(folder / "transformer" if pipeline else folder, max_shard_size="20KB")
    if pipeline:
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
        index = {"_class_name": "PRXPixelPipeline", "default_sample_size": 16, "noise_scale": 2.0}
        index |= {"prompt_max_tokens": 7, "transformer": ["diffusers", "PRXTransformer2DModel"]}
        (folder / "model_index.json").write_text(json.dumps(index))
    return network


@pytest.fixture
def null(tmp_path):
    torch.manual_seed(1)
    tensors = {"text": torch.randn(3, 24), "text_mask": torch.tensor([True, True, False])}
    save_file(tensors, tmp_path / "null.safetensors")
    return tmp_path / "null.safetensors", tensors


def imported(folder, null, *more):
    run = folder.parent / "run"
    assert main(["import", "prx", str(folder), str(run), "--null-text", str(null), *more]) == 0
    return run


@pytest.mark.parametrize(
    "more", [{"bottleneck_size": 6, "resolution_embeds": True}, {}], ids=["pixels", "plain"]
)
def test_a_pipeline_of_diffusers_is_the_network_that_it_was(more, null, tmp_path):
    network = theirs(tmp_path / "theirs", **more)
    file, tensors = null
    denoiser = dp.Run.open(imported(tmp_path / "theirs", file)).denoiser
    torch.manual_seed(2)
    x, sigma, text = torch.randn(2, 3, 16, 24), torch.tensor([0.3, 4.0]), torch.randn(2, 5, 24)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    time = sigma / (2 + sigma)
    seen = x * (1 - time)[:, None, None, None]
    with torch.no_grad():
        found = denoiser(x, sigma, text=text, text_mask=mask)
        published = network(seen, time, text, attention_mask=mask, return_dict=False)[0]
        torch.testing.assert_close(found, published, rtol=0, atol=1e-4)
        nobody = tensors["text"].expand(2, -1, -1), tensors["text_mask"].expand(2, -1)
        published = network(seen, time, nobody[0], attention_mask=nobody[1], return_dict=False)[0]
        torch.testing.assert_close(denoiser(x, sigma), published, rtol=0, atol=1e-4)


def test_an_imported_run_samples_as_the_published_loop_does(null, tmp_path):
    """Euler at the scheduler's times, the velocity divided by no less than 0.05."""
    diffusers = pytest.importorskip("diffusers")
    network = theirs(tmp_path / "theirs", bottleneck_size=6, resolution_embeds=True)
    file, tensors = null
    run = dp.Run.open(imported(tmp_path / "theirs", file))
    torch.manual_seed(3)
    noise = torch.randn(2, 3, 16, 16)
    nobody = tensors["text"].expand(2, -1, -1), tensors["text_mask"].expand(2, -1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    state = 2 * noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            time = (t / 1000).expand(2)
            image = network(state, time, nobody[0], attention_mask=nobody[1], return_dict=False)[0]
            velocity = (state - image) / max(float(t) / 1000, 0.05)
            state = scheduler.step(velocity, t, state).prev_sample
        sampler = config.build(run.model.config, "sampler")
        found = sampler(run.denoiser, noise, torch.randn_like)
    torch.testing.assert_close(found.float(), state, rtol=1e-3, atol=1e-3)


def test_what_no_file_says_is_asked_for(null, tmp_path, capsys):
    theirs(tmp_path / "theirs", pipeline=False, bottleneck_size=6)
    file, _ = null
    said = ["--set", "default_sample_size=16", "--set", "noise_scale=1.0"]
    line = ["import", "prx", str(tmp_path / "theirs"), str(tmp_path / "run")]
    for more, message in [
        ([], "default_sample_size: no file says it"),
        (said[:2], "noise_scale: no file says it"),
        (said, "null_text: no file says what stands for no text"),
        ([*said, "--null-text", "t5"], "unknown text encoder 't5'"),
        ([*said, "--set", "theta=5", "--null-text", str(file)], "theta: must be 10000"),
        ([*said, "--set", "axes_dim=[4, 12]", "--null-text", str(file)], "axes_dim: must be"),
        ([*said, "--set", "qk_norm=true", "--null-text", str(file)], "qk_norm: is not understood"),
        ([*said, "--set", "depth=3", "--null-text", str(file)], "blocks.2.attention.img_qkv_proj"),
    ]:
        assert main([*line, *more]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main([*line, *said, "--null-text", str(file)]) == 0


def test_other_networks_and_pipelines_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "PRXPipeline"}')
    with pytest.raises(UserError, match="not of a PRXPixelPipeline"):
        prx.read(tmp_path)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="must be of a PRXTransformer2DModel"):
        prx.read(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "PRXTransformer2DModel"}')
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(UserError, match="does not name the files of the shards beside it"):
        prx.read(tmp_path)


# By command.

TINY = """defaults: base
data:
  dataset: {_target_: diffusion_pl.data.synthetic.Synthetic, resolution: 16, count: 24,
    captions: minilm, caption_length: 16}
  batch_size: 8
network: {_target_: diffusion_pl.networks.prx.PRX, resolution: 16, patch_size: 4, width: 32,
  depth: 2, heads: 2, bottleneck: 8, text_width: 384, text_length: 16}
objective: {_target_: diffusion_pl.objectives.jit.JiT, noise_scale: 2.0, reversed_time: true}
optimizer: {lr: 1.0e-2}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 8}
sampler: {steps: 3}
features: {name: shapes}
evaluation: {every: 64, count: 16, batch_size: 16, grid: 4, guidance: 2.0}
trainer: {total_images: 64, checkpoint_every: 32, log_every: 32, accelerator: cpu, precision: fp32,
  dropout: {text: 0.2}}
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    minilm_or_skip()
    monkeypatch.chdir(tmp_path)
    homes.experiments(tmp_path, TINY)
    return homes.answering(capsys)


def drawn(result):
    with np.load(Path(result["folder"]) / "images.npz") as file:
        return file["images"].astype(int)


@pytest.mark.slow
def test_a_tiny_prx_trains_is_asked_and_measured(run, capsys):
    assert main(["train", "tiny"]) == 0
    capsys.readouterr()
    again = ("sample", "runs/tiny", "--count", 2, "--prompt")
    code, red, err = run(*again, "a red star", "--out", "red")
    assert code == 0, err
    code, blue, err = run(*again, "a blue moon", "--guidance", "text=3", "--out", "blue")
    assert code == 0 and blue["guidance"] == {"text": 3.0}, err
    assert (drawn(red) != drawn(blue)).any()
    code, measured, err = run("evaluate", "runs/tiny", "--count", 10, "--metrics", "score")
    assert code == 0 and measured["measures"], err


def laid_out(fixture, folder):
    """The published weights in the folders that diffusers reads."""
    inside = folder / "transformer"
    inside.mkdir(parents=True)
    config = dict(fixture.config)
    pipeline = {key: config.pop(key) for key in ("noise_scale", "t_eps") if key in config}
    known = {key: value for key, value in config.items() if key in prx.USUAL}
    (inside / "config.json").write_text(json.dumps({"_class_name": prx.NETWORK, **known}))
    save_file(fixture.weights, inside / "diffusion_pytorch_model.safetensors")
    side, length = fixture["x"].shape[-1], fixture["text"].shape[1]
    index = {"_class_name": prx.PIPELINE, "default_sample_size": side, "prompt_max_tokens": length}
    index["noise_scale"] = pipeline["noise_scale"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return pipeline["t_eps"]


def test_the_published_weights_are_imported_by_command(fixture, text, tmp_path):
    t_eps = laid_out(fixture, tmp_path / "theirs")
    null = {"text": fixture["null_text"][0], "text_mask": fixture["null_text_mask"][0]}
    save_file(null, tmp_path / "null.safetensors")
    more = ("--set", f"t_eps={t_eps}")
    run = dp.Run.open(imported(tmp_path / "theirs", tmp_path / "null.safetensors", *more))
    close(run.denoiser(noisy(fixture), fixture["sigma"], **text), fixture["out/denoised_yn"])
    close(run.denoiser(noisy(fixture), fixture["sigma"]), fixture["out/denoised_yn_null"])


@pytest.mark.slow
def test_an_imported_model_is_asked_and_tuned_with_the_encoder_of_its_null(run, tmp_path, capsys):
    theirs(tmp_path / "theirs", context_in_dim=384, bottleneck_size=6)
    index = json.loads((tmp_path / "theirs/model_index.json").read_text())
    index["prompt_max_tokens"] = 16
    (tmp_path / "theirs/model_index.json").write_text(json.dumps(index))
    imported(tmp_path / "theirs", "minilm", "--like", "tiny")
    capsys.readouterr()
    code, result, err = run("sample", "run", "--count", 2, "--prompt", "a red star", "--steps", 3)
    assert code == 0, err
    code, other, err = run(
        "sample", "run", "--count", 2, "--prompt", "x", "--steps", 3, "--out", "o"
    )
    assert code == 0 and (drawn(result) != drawn(other)).any(), err
    code, measured, err = run("evaluate", "run", "--count", 10, "--metrics", "score", "--steps", 3)
    assert code == 0 and measured["measures"], err
    assert main(["train", "run/config.yaml", "--from", "run", "--run", "runs/tuned"]) == 0
