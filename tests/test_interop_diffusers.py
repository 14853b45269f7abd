"""Published DDPM weights: reference outputs, the library's own network, Ho's converted keys."""

from __future__ import annotations

import json
import re
import warnings
from functools import partial

import pytest
import torch
from published import Fixture
from safetensors.torch import save_file

from diffusion_pl.diffusion.timesteps import CosineBetas, LinearBetas
from diffusion_pl.interop import diffusers, diffusers_export, pesser
from diffusion_pl.interop.denoisers import denoiser_from
from diffusion_pl.interop.layouts import DIFFUSERS, PESSER
from diffusion_pl.networks.ddpm_unet import DDPMUNet
from diffusion_pl.objectives.ddpm import DDPM, PredictImage, PredictNoise, PredictVelocity
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.euler import euler

F64 = torch.float64
LEVELS = LinearBetas().sigmas()


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def ho(parity):
    fixture = Fixture(parity / "ddpm_unet.npz")
    return fixture, denoiser_from(diffusers, fixture.config, fixture.weights)


def state_of(fixture, t, x_t):
    """A published state x_t in our coordinate."""
    sigma = LEVELS[t].reshape(-1, 1, 1, 1)
    return x_t.double() * torch.sqrt(1 + sigma**2), LEVELS[t]


@torch.no_grad()
def test_the_noise_is_the_published_one_in_our_coordinate(ho):
    fixture, denoiser = ho
    x, sigma = state_of(fixture, fixture["t"], fixture["x"])
    eps = (x - denoiser(x, sigma)) / sigma.reshape(-1, 1, 1, 1)
    # At sigma = 0.01 the division takes two digits of float32.
    assert relative(eps, fixture["out/eps"]) < 1e-4
    raw = denoiser.network(fixture["x"], fixture["t"].double())
    assert relative(raw, fixture["out/eps"]) < 1e-5


@torch.no_grad()
def test_noising_and_tables_are_the_published_ones(ho):
    fixture, _ = ho
    abar = 1 / (1 + LEVELS.square())
    # The reference multiplies 1,000 factors in float32.
    torch.testing.assert_close(abar.float(), fixture["out/alphas_cumprod"], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(LinearBetas().betas.float(), fixture["out/betas"])
    sigma = LEVELS[fixture["t"]].reshape(-1, 1, 1, 1)
    x_t = (fixture["y"] + sigma * fixture["noise"]) / torch.sqrt(1 + sigma**2)
    assert relative(x_t, fixture["out/q_sample"]) < 1e-5


@pytest.mark.parametrize("variance", ["small", "large"])
def test_every_reverse_variance_is_the_published_one(ho, variance):
    fixture, _ = ho
    zero, one = torch.zeros(1, 1, 1, 1, dtype=F64), torch.ones(1, 1, 1, 1, dtype=F64)
    steps = [
        ancestral(lambda x, s: zero, zero, LEVELS[[t, t - 1]], lambda x: one, variance=variance)
        for t in range(1, 1000, 37)
    ]
    found = torch.stack(steps).flatten() ** 2 / (1 + LEVELS[0:999:37] ** 2)
    expected = fixture[f"out/variance_fixed_{variance}"][1:1000:37]
    assert relative(found, expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("t", [0, 321, 999])
def test_clipped_images_and_posterior_means_are_the_published_ones(ho, t):
    fixture, denoiser = ho
    row = fixture["t"].tolist().index(t)
    x, sigma = state_of(fixture, torch.tensor([t]), fixture["x"][row : row + 1])
    assert relative(denoiser(x, sigma), fixture[f"out/x0_t{t}"]) < 1e-4
    after = LEVELS[t - 1] if t else torch.tensor(0.0, dtype=F64)
    clipped = lambda x, s: denoiser(x, s).clamp(-1, 1)  # noqa: E731
    step = ancestral(clipped, x, torch.stack([sigma[0], after]), torch.zeros_like)
    mean = step / torch.sqrt(1 + after**2)
    assert relative(mean, fixture[f"out/posterior_mean_clipped_t{t}"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_ends_where_the_published_trajectory_does(ho, steps):
    fixture, denoiser = ho
    sigmas = LEVELS[fixture[f"out/ddim_{steps}_timesteps"]]
    state = fixture["latents"].double() * torch.sqrt(1 + sigmas[0] ** 2)
    end = euler(denoiser, state, torch.cat([sigmas, torch.zeros(1, dtype=F64)]))
    assert relative(end, fixture[f"out/ddim_{steps}"]) < 1e-4


def test_the_attention_names_of_old_checkpoints_are_read(ho):
    fixture, denoiser = ho
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in fixture.weights.items():
        for name, before in new.items():
            key = key.replace(f".{name}.", f".{before}.")
        old[key] = value
    assert set(old) != set(fixture.weights)
    again = denoiser_from(diffusers, fixture.config, old)
    for one, other in zip(denoiser.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def pesser_name(key, levels):
    """The published name of a diffusers key, written down a second time."""
    for pattern, name in [
        (r"^time_embedding\.linear_(\d)", lambda m: f"temb.dense.{int(m[1]) - 1}"),
        (r"^conv_norm_out", lambda m: "norm_out"),
        (r"^mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"^mid_block\.attentions\.0", lambda m: "mid.attn_1"),
        (r"^down_blocks\.(\d)", lambda m: f"down.{m[1]}"),
        (r"^up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}"),
        (r"resnets\.", lambda m: "block."),
        (r"attentions\.", lambda m: "attn."),
        (r"(down|up)samplers\.0", lambda m: f"{m[1]}sample"),
        (r"group_norm", lambda m: "norm"),
        (r"to_([qkv])", lambda m: m[1]),
        (r"to_out\.0", lambda m: "proj_out"),
        (r"time_emb_proj", lambda m: "temb_proj"),
        (r"conv_shortcut", lambda m: "nin_shortcut"),
    ]:
        key = re.sub(pattern, name, key)
    return key


@pytest.fixture
def converted(ho):
    """The fixture's weights as they would lie in a converted checkpoint of Ho's."""
    fixture, _ = ho
    state = {}
    for key, value in fixture.weights.items():
        matrix = ".to_" in key and value.ndim == 2
        state[pesser_name(key, 2)] = value[:, :, None, None] if matrix else value
    return fixture, state


@torch.no_grad()
def test_hos_converted_keys_give_the_published_noise(converted, tmp_path):
    fixture, state = converted
    torch.save(state, tmp_path / "model-790000.ckpt")
    config, read = pesser.read(tmp_path / "model-790000.ckpt")
    assert config["channel_mult"] == [1, 2] and config["blocks"] == 1
    assert config["resolution"] == 32 and config["dropout"] == 0.1  # attention at 16, level 1
    # The published models have 32 groups; these weights were made with 8.
    denoiser = denoiser_from(pesser, config | {"groups": 8}, read)
    raw = denoiser.network(fixture["x"], fixture["t"].double())
    assert relative(raw, fixture["out/eps"]) < 1e-5


def test_hos_published_sizes_are_told_from_the_shapes():
    with torch.device("meta"):
        cifar = DDPMUNet(32)
        large = DDPMUNet(256, channel_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)
    for network, resolution, mult in ((cifar, 32, [1, 2, 2, 2]), (large, 256, [1, 1, 2, 2, 4, 4])):
        state = dict(PESSER.write(network))
        config = pesser.config_of(state)
        assert (config["resolution"], config["channel_mult"]) == (resolution, mult)
        assert config["model_channels"] == 128 and config["blocks"] == 2
        assert sum(value.numel() for value in state.values()) == sum(
            value.numel() for value in network.parameters()
        )
    assert "up.5.upsample.conv.weight" in state  # the lowest resolution, first in the decoder
    assert "up.0.upsample.conv.weight" not in state
    assert "down.4.attn.1.proj_out.bias" in state


@pytest.mark.parametrize("layout", [DIFFUSERS, PESSER])
def test_a_layout_is_read_back_as_it_was_written(layout):
    torch.manual_seed(0)
    network = DDPMUNet(8, model_channels=8, channel_mult=(1, 2), attention=(4,), groups=4)
    state = dict(layout.write(network))
    for key, value in layout.read(state, network).items():
        assert torch.equal(value, network.state_dict()[key]), key


SMALL = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1,
    "attention_head_dim": None, "norm_num_groups": 4, "norm_eps": 1e-6, "freq_shift": 1,
    "flip_sin_to_cos": False, "downsample_padding": 0,
}  # fmt: skip


@pytest.fixture
def library():
    """The diffusers package, whose import warns of its own matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


@torch.no_grad()
def test_a_model_of_the_library_with_classes_gives_the_same_noise(library, tmp_path):
    torch.manual_seed(0)
    theirs = library.UNet2DModel(**SMALL, num_class_embeds=5).eval()
    theirs.save_pretrained(tmp_path)
    scheduler = library.DDPMScheduler(800, beta_schedule="squaredcos_cap_v2")
    scheduler.save_pretrained(tmp_path)
    config, state = diffusers.read(tmp_path)
    assert diffusers.nodes(config)["sampler"]["steps"] == 800
    denoiser = denoiser_from(diffusers, config, state)
    x_t, t, label = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([4, 0])
    expected = theirs(x_t, t, class_labels=label).sample
    assert relative(denoiser.network(x_t, t.double(), label=label), expected) < 1e-5
    sigma = CosineBetas(800).sigmas()[t]
    torch.testing.assert_close(scheduler.betas, CosineBetas(800).betas.float())
    torch.testing.assert_close(denoiser.preconditioning(sigma).c_noise, t.double())


@torch.no_grad()
@pytest.mark.parametrize("classes", [0, 5])
def test_the_library_opens_an_exported_run_and_gives_the_same_noise(library, tmp_path, classes):
    torch.manual_seed(0)
    network = DDPMUNet(
        8, classes=classes, model_channels=8, channel_mult=(1, 2), blocks=1, attention=(4,),
        groups=4,
    )  # fmt: skip
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    denoiser = DDPM().denoiser(network.eval())
    diffusers_export.write(denoiser, 8, tmp_path, variance="large")
    theirs = library.UNet2DModel.from_pretrained(tmp_path, local_files_only=True).eval()
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    label = torch.tensor([4, 0]) if classes else None
    expected = theirs(x_t, t, class_labels=label).sample
    assert relative(network(x_t, t.double(), label=label), expected) < 1e-5
    scheduler = library.DDPMScheduler.from_pretrained(tmp_path)
    torch.testing.assert_close(scheduler.betas, LinearBetas().betas.float())
    assert scheduler.config.variance_type == "fixed_large"
    # And back: what was exported is read as what it was.
    again = denoiser_from(diffusers, *diffusers.read(tmp_path))
    for one, other in zip(again.parameters(), denoiser.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "prediction"),
    [(PredictNoise, "epsilon"), (PredictVelocity, "v_prediction"), (PredictImage, "sample")],
)
def test_a_prediction_is_what_its_name_says(library, make, prediction):
    """diffusers' own conversion of a network's answer to the clean image."""
    table = LinearBetas()
    scheduler = library.DDPMScheduler(prediction_type=prediction, clip_sample=False)
    image, noise = torch.randn(2, 1, 1, 4, 4)
    for t in (0, 500, 999):
        sigma = table.sigmas()[t]
        c = make(table)(sigma)
        state = image + sigma * noise
        x_t = scheduler.add_noise(image, noise, torch.tensor([t]))
        torch.testing.assert_close((c.c_in * state).float(), x_t, rtol=1e-4, atol=1e-5)
        answer = torch.randn(1, 1, 4, 4)
        theirs = scheduler.step(answer, t, x_t).pred_original_sample
        ours = c.c_skip * state + c.c_out * answer
        torch.testing.assert_close(ours.float(), theirs, rtol=2e-3, atol=1e-4)
    assert make(table).sigma_range == PredictNoise(table).sigma_range


@pytest.mark.parametrize("table", [LinearBetas(50, 1e-3, 0.1), CosineBetas(20)])
@pytest.mark.parametrize("prediction", [PredictNoise, PredictVelocity, PredictImage])
def test_tables_and_predictions_survive_export_and_import(tmp_path, table, prediction):
    network = DDPMUNet(8, model_channels=8, channel_mult=(1,), blocks=1, attention=(), groups=4)
    denoiser = DDPM().denoiser(network)
    denoiser.preconditioning = prediction(table)
    diffusers_export.write(denoiser, 8, tmp_path, clip=False)
    config, state = diffusers.read(tmp_path)
    again = denoiser_from(diffusers, config, state).preconditioning
    for one, other in zip(again(table.sigmas()), prediction(table)(table.sigmas()), strict=True):
        torch.testing.assert_close(one, other)
    assert diffusers.nodes(config)["sampler"]["clip_denoised"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": -1e-5}, r"norm_eps: must be a positive number \(got -1e-05\)"),
        ({"freq_shift": 2}, r"freq_shift: must be one of 0, 1 \(got 2\)"),
        ({"center_input_sample": True}, r"center_input_sample: must be False \(got True\)"),
        ({"attention_head_dim": 5}, "no whole number of attention heads"),
        ({"colour_space": "yuv"}, r"colour_space: is not understood here \(got 'yuv'\)"),
        ({"block_out_channels": [8, 24]}, r"channel_mult: is \[1, 3\] .* the weights fit \[1, 2\]"),
        ({"layers_per_block": 2}, r"blocks: is 2 by the config; the weights fit 1"),
        ({"num_class_embeds": 3}, r"classes: is 3 by the config; the weights fit 0"),
        ({"beta_schedule": "cubic"}, r"beta_schedule: must be one of linear, scaled_linear, squar"),
        ({"prediction_type": "flow"}, "prediction_type: must be one of epsilon"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "must mirror down_block_types"),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "got 'SkipDownBlock2D'"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(change, message):
    network = DDPMUNet(8, model_channels=8, channel_mult=(1, 2), blocks=1, attention=(4,), groups=4)
    with pytest.raises(ValueError, match=message):
        denoiser_from(diffusers, SMALL | change, dict(DIFFUSERS.write(network)))


def weights_of_small():
    network = DDPMUNet(8, model_channels=8, channel_mult=(1, 2), blocks=1, attention=(4,), groups=4)
    return dict(DIFFUSERS.write(network))


def test_keys_and_shapes_that_do_not_fit_are_named():
    key = "up_blocks.1.resnets.0.conv1.weight"
    for change, message in [
        (lambda s: s.pop(key), f"{key}: is missing in the diffusers layout"),
        (lambda s: s.update({key: s[key][:4]}), f"{key}: has shape (4, 24, 3, 3)"),
        (lambda s: s.update(more=s[key]), "more: is not in the network"),
    ]:
        state = weights_of_small()
        change(state)
        with pytest.raises(ValueError, match=re.escape(message)):
            denoiser_from(diffusers, SMALL, state)


def test_an_absent_key_has_the_librarys_default():
    left_out = {key: value for key, value in SMALL.items() if key != "norm_eps"}
    assert diffusers.nodes(SMALL)["network"]["eps"] == 1e-6
    assert diffusers.nodes(left_out)["network"]["eps"] == 1e-5


def test_another_layout_is_refused(tmp_path):
    torch.save({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 3, 3, 3)},
               tmp_path / "other.ckpt")  # fmt: skip
    with pytest.raises(ValueError, match=r"conv_in.weight: is missing in the pytorch_diffusion"):
        pesser.read(tmp_path / "other.ckpt")


def test_files_that_hold_code_are_refused(tmp_path):
    torch.save({"conv_in.weight": partial(print, "run")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        pesser.read(tmp_path / "evil.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "evil.ckpt").rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        diffusers.read(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert list(diffusers.read(tmp_path)[1]) == ["a"]  # safetensors are preferred


def test_networks_that_the_library_lacks_are_not_exported(tmp_path):
    small = {"model_channels": 8, "channel_mult": (1,), "blocks": 1, "attention": (), "groups": 4}
    with pytest.raises(ValueError, match="no position encoding"):
        diffusers_export.write(
            DDPM().denoiser(DDPMUNet(8, position_frequencies=2, **small)), 8, tmp_path
        )
    with pytest.raises(ValueError, match="only a DDPMUNet"):
        diffusers_export.write(DDPM().denoiser(torch.nn.Identity()), 8, tmp_path)
