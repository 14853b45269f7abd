"""`import guided`: state dicts of guided- and improved-diffusion, against the diffusers library.

With adaptive scale, [cos, sin] and its two ways to change the resolution, `UNet2DModel` is the same
function; its weights are renamed here to the published layout, written down a second time.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

from diffusion_pl import config as configs
from diffusion_pl.cli import main
from diffusion_pl.commands import parts, runs
from diffusion_pl.config import Config
from diffusion_pl.diffusion.timesteps import CosineBetas, LinearBetas
from diffusion_pl.interop import guided

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    library = pytest.importorskip("diffusers")

PARTS = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def theirs(residual, adaptive, heads, **more):
    torch.manual_seed(0)
    down = ("ResnetDownsampleBlock2D" if residual else "DownBlock2D", "AttnDownBlock2D")
    up = ("AttnUpBlock2D", "ResnetUpsampleBlock2D" if residual else "UpBlock2D")
    way = "resnet" if residual else "conv"
    network = library.UNet2DModel(**{
        "sample_size": 8, "layers_per_block": 2, "block_out_channels": (32, 64),
        "down_block_types": down, "up_block_types": up, "downsample_type": way,
        "upsample_type": way, "norm_num_groups": 32, "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if adaptive else "default",
        "attention_head_dim": 64 // heads, **more,
    }).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.requires_grad_(False)


def published(network, heads, new_order):
    """The network's weights as they would lie in a published file: 2 levels, 2 blocks."""
    names, state = {}, {}
    for place, number in {"down_blocks.0": 1, "down_blocks.1": 4}.items():
        names |= {f"{place}.resnets.{n}": f"input_blocks.{number + n}.0" for n in range(2)}
        names |= {f"{place}.attentions.{n}": f"input_blocks.{number + n}.1" for n in range(2)}
        names |= {f"{place}.downsamplers.0": f"input_blocks.{number + 2}.0"}
    for place, number in {"up_blocks.0": 0, "up_blocks.1": 3}.items():
        names |= {f"{place}.resnets.{n}": f"output_blocks.{number + n}.0" for n in range(3)}
        names |= {f"{place}.attentions.{n}": f"output_blocks.{number + n}.1" for n in range(3)}
        names |= {f"{place}.upsamplers.0": f"output_blocks.{number + 2}.2"}
    names |= {
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2", "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0", "conv_out": "out.2", "class_embedding": "label_emb",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    }  # fmt: skip
    own = network.state_dict()
    for key, value in own.items():
        if ".to_k." in key or ".to_v." in key:
            continue
        place = max((name for name in names if key.startswith(f"{name}.")), key=len)
        *part, leaf = key.removeprefix(f"{place}.").split(".")
        word = ".".join(part)
        if word == "to_q":
            q, k, v = (own[key.replace("to_q", f"to_{one}")] for one in "qkv")
            if new_order:  # all queries, then all keys, then all values
                value = torch.cat([q, k, v])
            else:  # of each head its queries, keys and values
                pieces = zip(*(one.chunk(heads) for one in (q, k, v)), strict=True)
                value = torch.cat([torch.cat(piece) for piece in pieces])
            word = "qkv"
        elif word == "to_out.0":
            word = "proj_out"
        elif word == "group_norm":
            word = "norm"
        elif word == "conv":
            word = "op" if "downsamplers" in key else "conv"
        else:
            word = PARTS.get(word, word)
        if word in ("qkv", "proj_out") and leaf == "weight":
            value = value[:, :, None]  # a convolution over a line of pixels
        state[".".join(w for w in (names[place], word, leaf) if w)] = value
    return state


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


FLAGS = {
    "image_size": 8, "noise_schedule": "cosine", "diffusion_steps": 40, "num_heads": 4,
    "use_new_attention_order": False, "rescale_timesteps": True, "sigma_small": False,
}  # fmt: skip


def words(flags):
    return [word for key, value in flags.items() for word in ("--set", f"{key}={value}")]


def imported(state, flags, *, old=False):
    torch.save(state, "model.pt", _use_new_zipfile_serialization=not old)
    assert main(["import", "guided", "model.pt", "runs/x", *words(flags)]) == 0
    model = runs.open_model(Path("runs/x"))
    return model, parts.sampler_of(model.config, model.objective)


def refused(capsys, state, flags):
    torch.save(state, "model.pt")
    code = main(["import", "guided", "model.pt", "runs/x", *words(flags)])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1, err
    return err


def close(one, other, tolerance=1e-5):
    one, other = one.double(), other.double()
    assert float((one - other).abs().max()) < tolerance * float(other.abs().max())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("new_order", [False, True])
@torch.no_grad()
def test_a_published_layout_gives_the_librarys_noise(residual, adaptive, new_order):
    network = theirs(residual, adaptive, 4, num_class_embeds=5, out_channels=6)
    flags = FLAGS | {"use_new_attention_order": new_order}
    model, sampler = imported(published(network, 4, new_order), flags, old=residual)
    x, t, label = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 30.0]), torch.tensor([4, 0])
    expected = network(x, t * 1000 / 40, class_labels=label).sample
    sigma = CosineBetas(40).sigmas()[t.long()]
    c = model.denoiser.preconditioning(sigma)
    close(model.denoiser.network(x, c.c_noise, label=label), expected)
    # And the network's last channels are the variance of its 40 steps.
    assert model.config.tree["sampler"]["integrate"]["variance"] == "learned"
    assert len(sampler.sigmas()) == 41
    assert main(["sample", "runs/x", "--count", "1", "--steps", "2"]) == 0


@torch.no_grad()
def test_heads_may_be_said_by_their_channels_and_timesteps_as_they_are():
    network = theirs(True, True, 2)
    flags = FLAGS | {"rescale_timesteps": False, "num_head_channels": 32, "sigma_small": True}
    del flags["num_heads"]
    model, _ = imported(published(network, 2, new_order=False), flags)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 30.0])
    c = model.denoiser.preconditioning(CosineBetas(40).sigmas()[t.long()])
    close(model.denoiser.network(x, c.c_noise), network(x, t).sample)
    assert model.config.tree["sampler"]["integrate"]["variance"] == "small"


@torch.no_grad()
def test_the_linear_table_and_respacing_are_the_published_ones():
    network = theirs(True, True, 1)
    flags = FLAGS | {"noise_schedule": "linear", "diffusion_steps": 500, "num_heads": 1}
    flags |= {"timestep_respacing": 25, "predict_xstart": True}
    model, sampler = imported(published(network, 1, new_order=False), flags)
    table = LinearBetas(500, 2e-4, 0.04).sigmas()  # 1000 / T times 1e-4 and 0.02
    # Nichol & Dhariwal 2021, section 4: 25 evenly spaced timesteps, first and last included.
    steps = torch.linspace(0, 499, 25, dtype=torch.float64).round().long().flip(0)
    torch.testing.assert_close(sampler.sigmas()[:-1], table[steps])
    x, t = torch.randn(1, 3, 8, 8), 250
    sigma = table[t]
    image = model.denoiser(x.double() * (1 + sigma**2).sqrt(), sigma)
    close(image, network(x, 2.0 * t).sample, 1e-4)


@pytest.mark.parametrize(
    "gone", ["image_size", "noise_schedule", "diffusion_steps", "num_heads",
             "use_new_attention_order", "rescale_timesteps", "sigma_small"],
)  # fmt: skip
def test_what_the_weights_do_not_tell_is_asked_for(gone, capsys):
    state = published(theirs(True, True, 4), 4, new_order=False)
    flags = {key: value for key, value in FLAGS.items() if key != gone}
    err = refused(capsys, state, flags)
    assert gone in err and "--set" in err and "64x64_diffusion" in err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"noise_schedule": "sqrt"}, "noise_schedule"),
        ({"learn_sigma": True}, "learn_sigma"),
        ({"num_channels": 64}, "num_channels"),
        ({"resblock_updown": False}, "resblock_updown"),
        ({"attention_resolutions": "8"}, "attention_resolutions"),
        ({"channel_mult": "1,3"}, "channel_mult"),
        ({"num_heads_upsample": 2}, "num_heads_upsample"),
        ({"num_heads": 7}, "heads"),
        ({"image_size": 10**9}, "image_size"),
        ({"timestep_respacing": "fast"}, "timestep_respacing"),
        ({"classifier_scale": 1.0}, "classifier_scale"),
        ({"published": "65x65"}, "published"),
    ],
)
def test_a_flag_that_does_not_fit_is_named(flags, named, capsys):
    state = published(theirs(True, True, 4), 4, new_order=False)
    assert named in refused(capsys, state, FLAGS | flags)


def test_upsamplers_classifiers_and_others_are_refused_by_name(capsys):
    state = published(theirs(True, True, 4, in_channels=6, out_channels=3), 4, new_order=False)
    assert "upsampler" in refused(capsys, state, FLAGS)
    state = published(theirs(True, True, 4), 4, new_order=False)
    encoder = {key: value for key, value in state.items() if not key.startswith("output_blocks")}
    assert "classifier" in refused(capsys, encoder, FLAGS)
    assert "input_blocks.0.0.weight" in refused(capsys, {"conv_in.weight": torch.ones(1)}, FLAGS)
    del state["output_blocks.4.0.in_layers.2.bias"]
    assert "output_blocks.4.0.in_layers.2.bias: is missing" in refused(capsys, state, FLAGS)
    state = published(theirs(True, True, 4), 4, new_order=False) | {"more": torch.ones(1)}
    assert "more: is not in the network" in refused(capsys, state, FLAGS)


# Channels at multiplier 1, multipliers, blocks, attention, classes, adaptive scale, residual
# resampling: the published command lines; and millions of parameters, Dhariwal & Nichol 2021,
# Tables 4 and 11, and the files' own names.
SIZES = {
    "64x64_diffusion": (192, (1, 2, 3, 4), 3, (32, 16, 8), 1000, True, True, 296),
    "128x128_diffusion": (256, (1, 1, 2, 3, 4), 2, (32, 16, 8), 1000, True, True, 422),
    "256x256_diffusion": (256, (1, 1, 2, 2, 4, 4), 2, (32, 16, 8), 1000, True, True, 554),
    "512x512_diffusion": (256, (0.5, 1, 1, 2, 2, 4, 4), 2, (32, 16, 8), 1000, True, True, 559),
    "imagenet64_cond_270M_250K": (192, (1, 2, 3, 4), 3, (16, 8), 1000, True, False, 270),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_published_networks_have_their_published_sizes(name):
    width, mult, blocks, attention, classes, adaptive, residual, millions = SIZES[name]
    flags = guided.PUBLISHED[name]
    side = flags["image_size"]
    sides = [side // 2**level for level in range(len(mult))]
    told = {
        "channels": 3, "learned_variance": True, "classes": classes, "model_channels": width,
        "channel_mult": list(mult), "blocks": blocks, "adaptive_scale": adaptive,
        "attends": [each in attention for each in sides],
        "resample": "block" if residual else "even",
    }  # fmt: skip
    assert guided.asked(flags | {guided.FROM_WEIGHTS: told}) is None
    tree = guided.nodes(flags | {guided.FROM_WEIGHTS: told})
    with torch.device("meta"):
        network = configs.build(Config("x", "x", tree), "network")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert round(parameters / 1e6, 0 if name.endswith("diffusion") else -1) == millions
    # The weights, under the names that these networks are published with, tell it all again.
    state = {
        guided._key(key, tree["network"]): value for key, value in network.state_dict().items()
    }
    state["label_emb.weight"] = state["label_emb.weight"].T
    assert guided.config_of_weights(state) == told
    if name == "128x128_diffusion":
        # Three blocks a level: what doubles stands behind the attention at 32, and alone at 64.
        assert "output_blocks.8.2.in_layers.2.weight" in state
        assert "output_blocks.11.1.in_layers.2.weight" in state
    assert not any(re.search(r"conv0|norm0|affine", key) for key in state)
