"""`import diffusers` against the library itself: networks, noise, sampled images, refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_pl.cli import main
from diffusion_pl.commands import parts, runs
from diffusion_pl.interop import diffusers
from diffusion_pl.interop.denoisers import denoiser_from

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    library = pytest.importorskip("diffusers")

BASE = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
    "block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 4,
}  # fmt: skip
OLD = {
    "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
    "norm_eps": 1e-6,
}  # fmt: skip
RESIDUAL = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet", "upsample_type": "resnet",
}  # fmt: skip


def unet(**more):
    """A network of the library's, all of whose weights matter."""
    torch.manual_seed(0)
    network = library.UNet2DModel(**(BASE | more)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.requires_grad_(False)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with the experiments that `import` begins from."""
    (tmp_path / "experiments").symlink_to(Path(__file__).parents[1] / "experiments")
    monkeypatch.chdir(tmp_path)


def put(network, scheduler, name="model"):
    """A model as people share it: `unet` and `scheduler`."""
    network.save_pretrained(f"{name}/unet")
    if scheduler is not None:
        scheduler.save_pretrained(f"{name}/scheduler")
    return name


def imported(name="model", *more):
    """The run of a folder, opened: its model and its sampler."""
    assert main(["import", "diffusers", name, "runs/x", *more]) == 0
    model = runs.open_model(Path("runs/x"))
    return model, parts.sampler_of(model.config, model.objective)


def notes_of(capsys):
    return json.loads(capsys.readouterr().out)["notes"]


def refused(capsys, *words):
    code = main(["import", "diffusers", *words])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    assert not Path("runs/x").exists()
    return err


def close(one, other, tolerance=1e-5):
    one, other = one.double(), other.double()
    assert float((one - other).abs().max()) < tolerance * float(other.abs().max())


class Draws:
    """Noise in the order in which the library's pipelines draw it."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, like):
        return torch.randn(like.shape, generator=self.generator)


def ours(model, sampler, shape=(2, 3, 8, 8)):
    """What our sampler makes of the library's noise."""
    draws = Draws()
    return sampler(model.denoiser, draws(torch.empty(shape)), draws)


# Networks.


@pytest.mark.parametrize(
    "more",
    [
        {},
        OLD,
        {"num_class_embeds": 5, "act_fn": "gelu", "time_embedding_dim": 20},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4, **RESIDUAL},
        {"mid_block_type": None, "freq_shift": 1, "act_fn": "mish"},
        {"add_attention": False, "act_fn": "relu", "block_out_channels": (8, 12),
         "attention_head_dim": 4},
        {"in_channels": 1, "out_channels": 1, "layers_per_block": 2},
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_network_of_the_library_gives_the_same_noise(more):
    network = unet(**more)
    model, _ = imported(put(network, library.DDPMScheduler()))
    channels = more.get("in_channels", 3)
    x, t = torch.randn(2, channels, 8, 8), torch.tensor([3, 700])
    label = torch.tensor([4, 0]) if "num_class_embeds" in more else None
    expected = network(x, t, class_labels=label).sample
    close(model.denoiser.network(x, t.double(), label=label), expected)


# Tables and predictions.

TABLES = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 250},
    {"beta_schedule": "sigmoid"},
    {"beta_schedule": "laplace"},
    {"trained_betas": [0.01, 0.2, 0.05, 0.4], "num_train_timesteps": 4},
    {"rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@torch.no_grad()
def test_every_table_and_prediction_gives_the_librarys_image(table, prediction, capsys):
    network = unet()
    scheduler = library.DDPMScheduler(**table, prediction_type=prediction, clip_sample=False)
    put(network, scheduler)
    if prediction == "epsilon" and "rescale_betas_zero_snr" in table:
        assert "rescale_betas_zero_snr" in refused(capsys, "model", "runs/x")
        return
    denoiser = denoiser_from(diffusers, *diffusers.read(Path("model")))
    T = scheduler.config.num_train_timesteps
    for t in (0, T // 2, T - 1):
        x_t = torch.randn(1, 3, 8, 8)
        theirs = scheduler.step(network(x_t, t).sample, t, x_t).pred_original_sample
        alpha_bar = scheduler.alphas_cumprod[t].double().clamp(min=1e-12)
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        image = denoiser(x_t.double() / alpha_bar.sqrt(), sigma)
        close(image, theirs, 1e-3 if prediction == "epsilon" else 1e-4)


CHAINS = [
    {},
    {"variance_type": "fixed_large"},
    {"variance_type": "fixed_small_log", "clip_sample": False},
    {"clip_sample_range": 0.5},
    {"thresholding": True, "sample_max_value": 3.0, "dynamic_thresholding_ratio": 0.8},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("more", CHAINS)
def test_the_pipelines_own_images_are_drawn(more):
    network = unet()
    scheduler = library.DDPMScheduler(20, beta_end=0.3, **more)
    library.DDPMPipeline(network, scheduler).save_pretrained("model")
    pipeline = library.DDPMPipeline.from_pretrained("model")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        2, torch.Generator().manual_seed(0), num_inference_steps=20, output_type="np"
    ).images
    image = ours(*imported())
    close(image.clamp(-1, 1), torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1, 1e-4)


@torch.no_grad()
def test_a_learned_variance_is_the_librarys(capsys):
    network = unet(out_channels=6)
    scheduler = library.DDPMScheduler(20, beta_end=0.3, variance_type="learned_range")
    model, sampler = imported(put(network, scheduler))
    draws, state = Draws(), None
    state = draws(torch.empty(2, 3, 8, 8))
    for t in scheduler.timesteps:
        answer = network(state, t).sample
        state = scheduler.step(answer, t, state, generator=draws.generator).prev_sample
    close(ours(model, sampler), state, 1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"clip_sample": False, "prediction_type": "v_prediction"},
        {"timestep_spacing": "trailing"},
        {"steps_offset": 1},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
         "timestep_spacing": "trailing"},
        {"thresholding": True, "sample_max_value": 2.0},
    ],
)  # fmt: skip
def test_the_images_of_ddim_are_drawn(more):
    network = unet()
    # 50 steps of a network of random weights would make anything of the last digit.
    network.conv_out.weight.mul_(0.1)
    pipeline = library.DDIMPipeline(network, library.DDIMScheduler(**more))
    pipeline.save_pretrained("model")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, torch.Generator().manual_seed(0), output_type="np").images
    model, sampler = imported()
    assert len(sampler.sigmas()) == 51
    image = ours(model, sampler)
    # Float32 on their side; another step or clipping is off by a tenth and more.
    close(image.clamp(-1, 1), torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1, 1e-3)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("EDMEulerScheduler", {}),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_data": 1.0}),
        ("EDMEulerScheduler", {"sigma_schedule": "exponential", "sigma_max": 40.0}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "num_train_timesteps": 500}),
    ],
)
@torch.no_grad()
def test_continuous_schedulers_draw_the_librarys_images(name, more):
    network = unet()
    scheduler = getattr(library, name)(**more)
    model, sampler = imported(put(network, scheduler))
    scheduler.set_timesteps(50)
    draws = Draws()
    state = draws(torch.empty(2, 3, 8, 8))
    flow = "Flow" in name
    state = state if flow else state * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = state if flow else scheduler.scale_model_input(state, t)
        state = scheduler.step(network(seen, t).sample, t, state).prev_sample
    close(ours(model, sampler), state, 1e-4)


def test_a_solver_of_the_librarys_stands_on_its_table_and_is_named(capsys):
    scheduler = library.UniPCMultistepScheduler(beta_schedule="scaled_linear", beta_end=0.01)
    _, sampler = imported(put(unet(), scheduler))
    [note] = notes_of(capsys)
    assert "UniPCMultistepScheduler" in note and "unipc" in note
    sigma = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    close(sampler.sigmas()[:1], sigma[-1:], 1e-3)


@torch.no_grad()
def test_a_solver_over_a_flow_is_a_flow():
    network = unet()
    scheduler = library.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
    )
    model, _ = imported(put(network, scheduler))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor(0.3)
    # The flow's own definition: x_t = (1 - t) image + t noise, F = noise - image.
    image = x - t * network(x, 1000 * t).sample
    close(model.denoiser(x / (1 - t), t / (1 - t)), image, 1e-4)


# What is refused, and what is asked for.


@pytest.mark.parametrize(
    "name",
    ["ScoreSdeVeScheduler", "KarrasVeScheduler", "CMStochasticIterativeScheduler", "SCMScheduler",
     "IPNDMScheduler", "LCMScheduler", "MadeUpScheduler", "EDM", 7],
)  # fmt: skip
def test_a_scheduler_of_another_kind_is_refused_by_name(name, capsys):
    put(unet(), library.DDPMScheduler())
    path = Path("model/scheduler/scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}))
    err = refused(capsys, "model", "runs/x")
    assert err.startswith("error: model")
    said = f"scheduler: {name} is not understood here" if isinstance(name, str) else "_class_name"
    assert said in err


@pytest.mark.parametrize(
    ("where", "change", "named"),
    [
        ("scheduler", {"beta_schedule": "cubic"}, "beta_schedule"),
        ("scheduler", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("scheduler", {"variance_type": "fixed_large_log"}, "variance_type"),
        ("scheduler", {"variance_type": "learned_range"}, "variance_type"),
        ("scheduler", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("scheduler", {"trained_betas": [0.1, 2.0], "num_train_timesteps": 2}, "trained_betas"),
        ("scheduler", {"beta_end": "0.02"}, "beta_end"),
        ("scheduler", {"clip_sample": "yes"}, "clip_sample"),
        ("scheduler", {"snr_gamma": 5}, "snr_gamma"),
        ("unet", {"sample_size": [8, 16]}, "sample_size"),
        ("unet", {"sample_size": None}, "--set sample_size=32"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet", {"time_embedding_type": "fourier"}, "time_embedding_type"),
        ("unet", {"mid_block_scale_factor": 1.414}, "mid_block_scale_factor"),
        ("unet", {"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups"),
        ("unet", {"act_fn": "elu"}, "act_fn"),
        ("unet", {"downsample_padding": 2}, "downsample_padding"),
        ("unet", {"out_channels": 4}, "out_channels"),
        ("unet", {"layers_per_block": 10**9}, "layers_per_block"),
        ("unet", {"block_out_channels": [8] * 10**5}, "block_out_channels"),
        ("unet", {"block_out_channels": [10**9, 16]}, "block_out_channels"),
        ("unet", {"num_class_embeds": 10**9}, "num_class_embeds"),
        ("unet", {"cross_attention_dim": 16}, "cross_attention_dim"),
        ("unet", {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ("unet", {"_class_name": "DiTTransformer2DModel"}, "DiTTransformer2DModel"),
    ],
)
def test_a_key_that_is_not_understood_is_named(where, change, named, capsys):
    put(unet(), library.DDPMScheduler())
    name = "config.json" if where == "unet" else "scheduler_config.json"
    path = Path("model") / where / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    err = refused(capsys, "model", "runs/x")
    assert named in err and len(err) < 600


def test_a_latent_pipeline_is_refused_by_its_second_network(capsys):
    library.DDPMPipeline(unet(), library.DDPMScheduler()).save_pretrained("model")
    path = Path("model/model_index.json")
    index = json.loads(path.read_text())
    for change, named in [
        ({"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}, "VQModel"),
        ({"_class_name": "ConsistencyModelPipeline"}, "ConsistencyModelPipeline"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "UNet2DConditionModel"),
    ]:
        path.write_text(json.dumps(index | change))
        assert named in refused(capsys, "model", "runs/x")
    path.write_text(json.dumps(index | {"_class_name": "LDMPipeline", "vae": ["x", "Coder"]}))
    assert "Coder" in refused(capsys, "model/unet", "runs/x")  # nor its network alone
    path.unlink()
    Path("model/vae").mkdir()
    Path("model/vae/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert "AutoencoderKL" in refused(capsys, "model", "runs/x")


def test_variants_and_shards_are_named(capsys):
    unet().save_pretrained("half/unet", variant="fp16")
    assert "diffusion_pytorch_model.fp16.safetensors" in refused(capsys, "half", "runs/x")
    unet(block_out_channels=(32, 64)).save_pretrained("shards/unet", max_shard_size="100KB")
    assert "shards" in refused(capsys, "shards", "runs/x")
    Path("bare").mkdir()
    assert "config.json" in refused(capsys, "bare", "runs/x")


@torch.no_grad()
def test_what_no_file_says_is_asked_for_and_can_be_said(capsys):
    network = unet(sample_size=None)
    put(network, None)
    err = refused(capsys, "model", "runs/x")
    assert "scheduler_config.json" in err and "--set" in err
    said = ["_class_name=DDPMScheduler", "prediction_type=sample", "num_train_timesteps=100",
            "sample_size=8"]  # fmt: skip
    words = [word for text in said for word in ("--set", text)]
    model, sampler = imported("model", *words)
    x = torch.randn(1, 3, 8, 8)
    alpha_bar = library.DDPMScheduler(100).alphas_cumprod[50].double()
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    image = model.denoiser(x.double() / alpha_bar.sqrt(), sigma)
    close(image, network(x, 50).sample, 1e-4)
    assert len(sampler.sigmas()) == 101


@torch.no_grad()
def test_an_objective_of_ours_may_be_said_instead():
    network = unet()
    put(network, None)
    objective = "objective={_target_: diffusion_pl.objectives.edm.EDM, sigma_data: 1.0}"
    model, sampler = imported("model", "--set", objective)
    x, sigma = torch.randn(1, 3, 8, 8), torch.tensor(1.0)
    # Karras 2022, Table 1, at sigma = sigma_data = 1.
    expected = x / 2 + network(x / 2**0.5, torch.zeros(())).sample / 2**0.5
    close(model.denoiser(x, sigma), expected, 1e-4)
    assert float(sampler.sigmas()[0]) == pytest.approx(80)


# Training checkpoints, kinds of files, precisions.


def test_the_average_of_a_training_checkpoint_is_taken_and_the_choice_is_said(capsys):
    from diffusers.training_utils import EMAModel

    network = unet()
    average = EMAModel(network.parameters(), model_cls=type(network), model_config=network.config)
    average.save_pretrained("out/checkpoint-500/unet_ema")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    network.save_pretrained("out/checkpoint-500/unet")
    library.DDPMScheduler(50).save_pretrained("out/scheduler")
    model, _ = imported("out/checkpoint-500")
    assert any("unet_ema" in note and "--weights raw" in note for note in notes_of(capsys))
    expected = load_file("out/checkpoint-500/unet_ema/diffusion_pytorch_model.safetensors")
    assert torch.equal(model.denoiser.network.stem.weight, expected["conv_in.weight"])
    assert main(["import", "diffusers", "out/checkpoint-500", "runs/raw", "--weights", "raw"]) == 0
    raw = runs.open_model(Path("runs/raw")).denoiser.network.stem.weight
    torch.testing.assert_close(raw, 2 * expected["conv_in.weight"])
    assert main(["import", "diffusers", "out/checkpoint-500/unet_ema", "runs/alone"]) == 0


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_and_said(kind, capsys):
    network = unet().to(kind)
    model, _ = imported(put(network, library.DDPMScheduler()))
    assert any(str(kind).removeprefix("torch.") in note for note in notes_of(capsys))
    stem = model.denoiser.network.stem.weight
    assert stem.dtype == torch.float32 and torch.equal(stem, network.conv_in.weight.float())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("old", [False, True])
def test_pickled_weights_of_both_times_are_read(prefix, old):
    network = unet()
    put(network, library.DDPMScheduler())
    Path("model/unet/diffusion_pytorch_model.safetensors").unlink()
    state = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    path = "model/unet/diffusion_pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    model, _ = imported()
    assert torch.equal(model.denoiser.network.stem.weight, network.conv_in.weight)


def test_values_that_are_not_finite_are_refused(capsys):
    network = unet()
    network.conv_out.bias.fill_(float("nan"))
    put(network, library.DDPMScheduler())
    assert "conv_out.bias" in refused(capsys, "model", "runs/x")


# The way back.


def test_a_folder_that_was_exported_is_a_pipeline_and_draws_the_same():
    network = unet(**RESIDUAL)
    betas = [0.01, 0.2, 0.05, 0.4, 0.3]
    scheduler = library.DDPMScheduler(5, trained_betas=betas, variance_type="fixed_large")
    model, sampler = imported(put(network, scheduler))
    assert main(["export", "runs/x", "back", "--format", "diffusers"]) == 0
    pipeline = library.DDPMPipeline.from_pretrained("back", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert list(pipeline.scheduler.config.trained_betas) == betas
    drawn = pipeline(
        2, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np"
    ).images
    image = ours(model, sampler)
    close(image.clamp(-1, 1), torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1, 1e-4)
    assert main(["import", "diffusers", "back", "runs/again"]) == 0
    again = runs.open_model(Path("runs/again"))
    for key, value in model.denoiser.state_dict().items():
        torch.testing.assert_close(again.denoiser.state_dict()[key], value)
    assert again.config.tree["sampler"] == model.config.tree["sampler"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        OLD,
        {"num_class_embeds": 5, "act_fn": "gelu", "time_embedding_dim": 20},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4, **RESIDUAL},
        {"mid_block_type": None, "out_channels": 6},
        {"add_attention": False, "block_out_channels": (8, 12), "attention_head_dim": 4},
    ],
)
@torch.no_grad()
def test_every_setting_goes_back_as_it_came(more):
    network = unet(**more)
    kind = "learned_range" if "out_channels" in more else "fixed_small"
    imported(put(network, library.DDPMScheduler(variance_type=kind)))
    assert main(["export", "runs/x", "back", "--format", "diffusers"]) == 0
    again = library.UNet2DModel.from_pretrained("back", local_files_only=True).eval()
    x, label = torch.randn(2, 3, 8, 8), torch.tensor([4, 0])
    label = label if "num_class_embeds" in more else None
    close(again(x, 7, class_labels=label).sample, network(x, 7, class_labels=label).sample)
    scheduler = library.DDPMScheduler.from_pretrained("back")
    assert scheduler.config.variance_type == kind


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_models_of_one_and_four_channels_are_imported_and_sampled(channels, mode):
    from PIL import Image

    network = unet(in_channels=channels, out_channels=channels)
    imported(put(network, library.DDPMScheduler(4, beta_end=0.3)))
    assert main(["sample", "runs/x", "--count", "2", "--out", "drawn"]) == 0
    pictures = sorted(Path("drawn").rglob("0*.png"))
    assert len(pictures) == 2
    for picture in pictures:
        with Image.open(picture) as opened:
            assert opened.mode == mode


def test_a_safetensors_header_of_any_length_is_not_taken_in(capsys):
    put(unet(), library.DDPMScheduler())
    path = Path("model/unet/diffusion_pytorch_model.safetensors")
    save_file({"a": torch.zeros(1)}, path, metadata={"words": "[" * 2**23})
    assert "header is larger" in refused(capsys, "model", "runs/x")


def test_a_config_larger_than_any_is_not_taken_in(capsys):
    put(unet(), library.DDPMScheduler())
    Path("model/unet/config.json").write_text('{"a": "' + " " * 2**20 + '"}')
    assert "larger than" in refused(capsys, "model", "runs/x")
