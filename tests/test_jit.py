"""JiT: network, objective, sampler and checkpoints, against reference outputs and definitions."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from analytic import Gaussian
from published import Fixture
from torch import nn

import diffusion_pl as dp
from diffusion_pl import config
from diffusion_pl.cli import main
from diffusion_pl.commands import latents, parts, sampling
from diffusion_pl.diffusion.guidance import VelocityClamp, guided
from diffusion_pl.diffusion.objective import EpsWeight
from diffusion_pl.diffusion.paths import Along
from diffusion_pl.diffusion.schedules import Rho, levels
from diffusion_pl.diffusion.spacings import EqualSteps
from diffusion_pl.errors import UserError
from diffusion_pl.interop import jit
from diffusion_pl.networks.jit import Attention, JiT, Neighbours, SwiGLU
from diffusion_pl.networks.routing import Routing
from diffusion_pl.networks.tokens import patch_table, rotary_table, rotated, unrotated
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.objectives.jit import JiT as Objective
from diffusion_pl.objectives.rectified_flow import Straight
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.inversion import invert
from diffusion_pl.samplers.named import integrator
from diffusion_pl.samplers.sampler import Sampler

F64 = torch.float64
FOLDER = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def fixture(parity):
    return Fixture(parity / "jit.npz")


@pytest.fixture
def denoiser(fixture):
    return jit.denoiser_from(fixture.config, fixture.weights)


def tiny(**settings):
    """A network whose every part has a say in the output."""
    torch.manual_seed(0)
    usual = {"patch_size": 4, "width": 16, "depth": 4, "heads": 2, "bottleneck": 6}
    usual |= {"classes": 3, "class_tokens": 2, "class_tokens_from": 1}
    network = JiT(**({"resolution": 16} | usual | settings))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


# The published outputs.


def test_the_network_and_the_denoiser_give_the_published_outputs(fixture, denoiser):
    raw = denoiser.network(fixture["x"], fixture["c_noise"], label=fixture["label"])
    torch.testing.assert_close(raw, fixture["out/raw_output"], rtol=1e-5, atol=1e-5)
    sigma = fixture["sigma"]
    noisy = fixture["x"] * sigma[:, None, None, None]
    found = denoiser(noisy, sigma, label=fixture["label"])
    torch.testing.assert_close(found, fixture["out/denoised_x"], rtol=1e-5, atol=1e-5)
    noisy = fixture["y"] + fixture["noise"] * sigma[:, None, None, None]
    found = denoiser(noisy, sigma, label=fixture["label"])
    torch.testing.assert_close(found, fixture["out/denoised_yn"], rtol=1e-5, atol=1e-5)
    nobody = torch.full_like(fixture["label"], -1)
    for condition in ({}, {"label": None}, {"label": nobody}):
        found = denoiser(noisy, sigma, **condition)
        torch.testing.assert_close(found, fixture["out/denoised_yn_null"], rtol=1e-5, atol=1e-5)


def test_the_published_velocity_is_the_clamped_one(fixture, denoiser):
    sigma = fixture["sigma"].double()
    noisy = fixture["y"] + fixture["noise"] * fixture["sigma"][:, None, None, None]
    t = (1 / (1 + sigma))[:, None, None, None].float()
    torch.testing.assert_close(t * noisy, fixture["out/z"], rtol=1e-5, atol=1e-6)
    clamped = VelocityClamp()(denoiser)(noisy, sigma, label=fixture["label"])
    # The plain velocity of the clamped denoiser.
    velocity = (clamped - t * noisy) / (1 - t)
    torch.testing.assert_close(velocity, fixture["out/v"], rtol=1e-4, atol=1e-4)


def test_loss_and_gradients_are_the_published_ones(fixture, denoiser):
    sigma = fixture["sigma"].double()
    objective = Objective()
    # u of the fixture's levels: the normal distribution function of their logits.
    u = torch.special.ndtr((sigma.log() - 0.8) / 0.8)
    torch.testing.assert_close(objective.schedule(u), sigma, rtol=1e-5, atol=0)
    # The levels themselves: float64 of u would round them.
    exact = dataclasses.replace(objective, schedule=lambda u: sigma)
    denoiser.requires_grad_(True)
    loss = exact.loss(denoiser, fixture["y"], u, fixture["noise"], label=fixture["label"])
    published = fixture["out/weighted_sq_error"].mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, published, rtol=1e-5, atol=1e-6)
    loss.mean().backward()
    names = {theirs: ours for ours, theirs in jit.names(denoiser.network)}
    own = dict(denoiser.network.named_parameters())
    norms = json.loads(str(fixture.arrays["grad_names"]))
    for theirs, norm in zip(norms, fixture["out/grad_norms"], strict=True):
        gradient = own[names[theirs.removeprefix("net.")]].grad
        assert float(gradient.double().norm()) == pytest.approx(float(norm), rel=1e-5, abs=1e-7)
    for key in fixture.arrays.files:
        if key.startswith("out/grad/"):
            gradient = own[names[key.removeprefix("out/grad/net.")]].grad
            found = gradient.reshape(fixture[key].shape)
            torch.testing.assert_close(found, fixture[key], rtol=1e-5, atol=1e-6)


def test_trajectories_end_where_the_published_ones_do(fixture, denoiser):
    for name, said in json.loads(str(fixture.arrays["runs"])).items():
        low, high = said["interval"]
        # Guided strictly inside the interval of t: t = 0.1 of 50 steps is not.
        inside = (1 - high) / high, (1 - low) / low * (1 - 1e-9) if low else math.inf
        known = {"label": fixture["latent_labels"]}
        denoise = guided(denoiser, condition=known, weight=said["cfg"], interval=inside)
        integrate = partial(heun, noise_scale=1.0) if said["method"] == "heun" else euler
        sampler = Sampler(
            integrate, Along(Straight(), 0.0, 1.0), said["steps"], EqualSteps(),
            velocity_clamp=VelocityClamp(),
        )  # fmt: skip
        found = sampler(denoise, fixture["latents"], torch.randn_like)
        torch.testing.assert_close(found, fixture[f"out/{name}"], rtol=1e-5, atol=1e-5)


# The network.


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("imagenet256_jit_b16", 131_123_712),
        ("imagenet256_jit_l16", 458_877_664),
        ("imagenet256_jit_h16", 952_514_368),
        ("imagenet256_jit_g16", 2_007_130_000),
        ("imagenet512_jit_b32", 133_190_400),
        ("imagenet512_jit_l32", 461_534_176),
        ("imagenet512_jit_h32", 956_055_616),
        ("imagenet512_jit_g32", 2_011_555_984),
    ],
)
def test_the_experiments_hold_the_published_sizes_and_settings(name, count):
    experiment = config.load(name, (), FOLDER)
    parts.bind(experiment)
    network = parts.meta_network(experiment)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    side = 512 if "512" in name else 256
    epoch = 1_281_167 // 1024 * 1024  # whole batches
    published = {
        "data.batch_size": 1024,
        "data.dataset.resolution": side,
        "network.patch_size": side // 16,
        "objective.mean": -0.8,
        "objective.std": 0.8,
        "objective.noise_scale": side / 256,
        "objective.t_eps": 0.05,
        "optimizer.lr": 2e-4,
        "optimizer.betas": [0.9, 0.95],
        "lr_schedule.warmup": 5 * epoch,
        "sampler.integrate.noise_scale": side / 256,
        "sampler.schedule.path.shift": side / 256,
        "sampler.velocity_clamp.noise_scale": side / 256,
        "sampler.steps": 50,
        "evaluation.labels": "balanced",
        "evaluation.count": 50_000,
        "trainer.total_images": 200 * epoch,
        "trainer.dropout.label": 0.1,
    }
    assert {key: experiment.get(key) for key in published} == published
    assert config.build(experiment, "ema").decay(0, 1024) == pytest.approx(0.9999, abs=1e-9)
    # The published interval is t in (0.1, 1), both open; t = 0.1 is the grid's sixth time.
    sigmas = config.build(experiment, "sampler").sigmas()
    low, high = experiment.get("evaluation.guidance_interval")
    guides = (sigmas[:-1] > low) & (sigmas[:-1] <= high)
    assert guides.tolist() == [False] * 6 + [True] * 44
    size = name.rpartition("_")[2][0].upper()
    width, depth, heads, bottleneck, start = jit.SIZES[size]
    assert (network.width, len(network.blocks)) == (width, depth)
    assert network.blocks[0].attention.heads == heads
    assert network.patches.weight.shape[0] == bottleneck
    assert network.class_tokens_from == start
    dropped = [i for i, block in enumerate(network.blocks) if block.mlp.drop.p > 0]
    assert dropped == (list(range(depth // 4, 3 * (depth // 4))) if size in "HG" else [])


def test_a_new_network_gives_zero_and_knows_where_a_patch_lies():
    torch.manual_seed(0)
    network = JiT(16, classes=3, patch_size=4, width=16, depth=2, heads=2, class_tokens_from=1)
    x = torch.randn(2, 3, 16, 16)
    assert network(x, torch.tensor([0.2, 0.8])).abs().max() == 0
    network = tiny()
    one = x[:1].clone()
    moved = one.roll(4, dims=3)  # the same patches, elsewhere
    level = torch.tensor([0.5])
    assert not torch.allclose(network(one, level).roll(4, dims=3), network(moved, level), atol=1e-3)


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (32, 16)])
def test_any_sides_that_the_patch_divides_are_taken(shape):
    x = torch.randn(2, 3, *shape)
    found = tiny()(x, torch.tensor([0.2, 0.8]), label=torch.tensor([0, -1]))
    assert found.shape == x.shape
    assert found.isfinite().all()


def test_output_patches_lie_where_input_patches_do():
    # With no blocks at work and the head a copy of a patch's mean, the image is its patches' means.
    network = JiT(8, 1, patch_size=4, width=16, depth=1, heads=2, class_tokens=0)
    with torch.no_grad():
        network.patches.weight.zero_()
        network.patches.weight[0, 0] = 1 / 16
        network.head.bias.copy_(torch.arange(16.0))
    found = network(torch.zeros(1, 1, 8, 8), torch.tensor([0.5]))
    block = torch.arange(16.0).reshape(4, 4)
    torch.testing.assert_close(found[0, 0], block.repeat(2, 2))


def test_rotary_products_depend_on_the_distance_of_patches_alone():
    table = rotary_table(8, 4, 6, torch.device("cpu"))
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    turned = [rotated(one.expand(1, 1, 24, 8), table)[0, 0].unflatten(0, (4, 6)) for one in (q, k)]
    product = torch.einsum("abi,cdi->abcd", *turned)
    for row, column in [(1, 0), (0, 1), (2, 3)]:
        first = product[0, 0, row, column]
        assert torch.allclose(product[1, 2, 1 + row, 2 + column], first, atol=1e-5)
    assert torch.allclose(product[0, 0, 0, 0], q @ k, atol=1e-5)
    # Neighbouring channels turn together: of one pair alone, the other channels stay zero.
    pair = torch.zeros(8)
    pair[2] = 1
    found = rotated(pair.expand(1, 1, 24, 8), table)[0, 0]
    angle = torch.arange(4).repeat_interleave(6) * 10000 ** (-2 / 4)  # rows turn the first half
    torch.testing.assert_close(found[:, 2], angle.cos())
    torch.testing.assert_close(found[:, 3], angle.sin())
    assert found[:, [0, 1, 4, 5, 6, 7]].abs().max() == 0
    # A compiler is given products of real numbers.
    x = torch.randn(2, 3, 24, 8, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(rotated, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), rotated(x, table))
    front = rotated(pair.expand(1, 1, 26, 8), unrotated(2, table))[0, 0]
    torch.testing.assert_close(front[:2], pair.expand(2, 8))
    torch.testing.assert_close(front[2:], found)


def test_the_table_of_patches_is_the_fixed_one():
    table = patch_table(8, 2, 3, torch.device("cpu"))
    for place, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        wanted = []
        for at in (column, row):
            phases = [at * 10000 ** (-k / 2) for k in range(2)]
            wanted += [*map(math.sin, phases), *map(math.cos, phases)]
        assert table[place].tolist() == pytest.approx(wanted, abs=1e-6)


def test_checkpointing_changes_no_gradient_and_bf16_stays_near():
    x, level, label = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.8]), torch.tensor([0, 2])
    found = []
    for checkpointed in (False, True):
        network = tiny(activation_checkpointing=checkpointed).train()
        network(x, level, label=label).square().mean().backward()
        found.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    network = tiny().eval()
    exact = network(x, level, label=label)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x, level, label=label)
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_dropout_takes_of_the_attentions_output_and_of_the_mlps_hidden_values():
    torch.manual_seed(0)
    attention, mlp = Attention(16, 2, 0.5).train(), SwiGLU(16, 0.5).train()
    x, rotary = torch.randn(4, 16, 16), rotary_table(8, 4, 4, torch.device("cpu"))
    zeros = (attention(x, rotary) == 0).double().mean()
    assert float(zeros) == pytest.approx(0.5, abs=0.05)
    assert not (attention.eval()(x, rotary) == 0).any()
    mlp.w3 = nn.Identity()
    assert float((mlp(x) == 0).double().mean()) == pytest.approx(0.5, abs=0.05)


def test_neighbours_are_convolved_by_channel_and_class_tokens_are_not():
    """The definition, patch by patch: a kernel over the grid, zero beyond it, for each channel."""
    torch.manual_seed(0)
    layer = Neighbours(5, 3)
    x = torch.randn(2, 2 + 3 * 4, 5)
    found = layer(x, (3, 4))
    assert torch.equal(found[:, :2], x[:, :2])
    grid = x[:, 2:].reshape(2, 3, 4, 5)
    kernel, bias = layer.conv.weight[:, 0], layer.conv.bias
    for row in range(3):
        for column in range(4):
            expected = grid[:, row, column] + bias
            for i in range(3):
                for j in range(3):
                    r, c = row + i - 1, column + j - 1
                    if 0 <= r < 3 and 0 <= c < 4:
                        expected = expected + kernel[:, i, j] * grid[:, r, c]
            place = 2 + 4 * row + column
            torch.testing.assert_close(found[:, place], expected)


@pytest.mark.parametrize("shape", [(16, 16), (8, 24)])
def test_a_network_with_neighbours_takes_any_sides_and_checkpoints(shape):
    networks = [tiny(convolution=3, activation_checkpointing=c) for c in (False, True)]
    networks[1].load_state_dict(networks[0].state_dict())
    x, level, label = torch.randn(2, 3, *shape), torch.tensor([0.2, 0.8]), torch.tensor([0, -1])
    plain, checkpointed = (network(x, level, label=label) for network in networks)
    assert plain.shape == x.shape
    assert torch.equal(plain, checkpointed)
    plain.sum().backward()
    for block in networks[0].blocks:
        assert block.neighbours.conv.weight.grad.abs().min() > 0
    without = tiny()
    missing = networks[0].state_dict().keys() - without.state_dict().keys()
    assert {key.split(".", 2)[2] for key in missing} == {
        "neighbours.conv.weight", "neighbours.conv.bias"
    }  # fmt: skip


def test_positions_of_a_pyramid_join_the_image():
    network = tiny(position_frequencies=2, frame=32)
    x = torch.randn(1, 3, 16, 16)
    half = torch.stack(torch.meshgrid(*2 * [torch.linspace(0, 0.5, 16)], indexing="ij"))
    whole = network(x, torch.tensor([0.5]))
    assert not torch.allclose(network(x, torch.tensor([0.5]), position=half), whole, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 18}, "multiples of patch_size, 4 (got 18 x 18)"),
        ({"classes": 0}, "class tokens need classes (got class_tokens: 2, classes: 0)"),
        ({"class_tokens_from": 4}, "class_tokens_from must be a block from 0 to 3 (got 4)"),
        ({"width": 20}, "width must be a multiple of 4 heads"),
        ({"patch_size": 0}, "patch_size must be at least 1 (got 0)"),
        ({"bottleneck": 0}, "bottleneck must be at least 1 (got 0)"),
        ({"width": 0}, "width must be at least 1 (got 0)"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), and 0 below 4 blocks"),
        ({"convolution": 2}, "convolution must be 0 or an odd side (got 2)"),
        ({"convolution": -1}, "convolution must be 0 or an odd side (got -1)"),
        ({"convolution": 3, "routing": Routing(last=2)}, "convolution needs all patches"),
        ({"dropout": 0.5, "depth": 3}, "which have no middle half (got 0.5 for depth 3)"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings, message):
    with pytest.raises(UserError) as caught:
        tiny(**settings)
    assert message in str(caught.value)
    with pytest.raises(UserError, match="multiples of patch_size"):
        tiny()(torch.zeros(1, 3, 16, 18), torch.tensor([0.5]))


# The objective.


class Says(nn.Module):
    """A network with one stated answer that notes what it was shown."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, c_noise):
        self.seen = x, c_noise
        return self.answer


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("loss", ["image", "noise", "velocity"])
@pytest.mark.parametrize("predict", ["image", "noise", "velocity", "edm"])
def test_each_loss_of_each_prediction_is_the_papers(predict, loss, scale):
    source = torch.Generator().manual_seed(0)
    x, eps, answer = torch.randn(3, 9, 1, 4, 4, generator=source, dtype=F64).float()
    u = torch.linspace(0.02, 0.98, 9, dtype=F64)
    objective = Objective(noise_scale=scale, predict=predict, loss=loss, sigma_data=0.3)
    network = Says(answer)
    found = objective.loss(objective.denoiser(network), x, u, eps)
    # The paper's own variables: logit t normal, z = t x + (1 - t) e.
    t = torch.sigmoid(-0.8 - 0.8 * torch.special.ndtri(u))[:, None, None, None]
    x, eps, answer = x.double(), eps.double(), answer.double()
    e = scale * eps
    z = t * x + (1 - t) * e
    if predict == "edm":
        sigma = scale * (1 - t) / t
        total = sigma.square() + 0.3**2
        shown = (z / t) / total.sqrt()
        image = 0.3**2 / total * (z / t) + 0.3 * sigma / total.sqrt() * answer
    else:
        shown = z
        image = {
            "image": answer,
            "noise": (z - (1 - t) * answer) / t,
            "velocity": z + (1 - t) * answer,
        }[predict]
    m = (1 - t).clamp(min=0.05)
    error = {
        "image": image - x,
        "noise": ((z - t * image) - (z - t * x)) / m,
        "velocity": (image - z) / m - (x - z) / m,
    }[loss]
    expected = error.square().mean(dim=(1, 2, 3)).float()
    torch.testing.assert_close(network.seen[0].double(), shown, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.seen[1].double(), t.flatten(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_golden_levels_and_weights():
    sigma = torch.tensor([0.02, 1 / 19, 0.5, 1, 9, 80], dtype=F64)
    objective = Objective()
    t = objective.preconditioning(sigma).c_noise
    assert t.tolist() == pytest.approx([0.980392, 0.95, 0.666667, 0.5, 0.1, 0.0123457], rel=1e-5)
    weight = objective.weight(sigma).tolist()
    assert weight == pytest.approx([400, 400, 9, 4, 1.234568, 1.025156], rel=1e-6)
    for scale, median in ((1.0, 2.2255), (2.0, 4.4511), (4.0, 8.9022)):
        u = torch.tensor([0.15865525, 0.5, 0.84134475], dtype=F64)
        found = Objective(noise_scale=scale).schedule(u).tolist()
        assert found == pytest.approx([scale, median, 4.9530 * scale], rel=1e-4)
    c = Objective(timestep_scale=1000.0).preconditioning(sigma)
    torch.testing.assert_close(c.c_noise, 1000 * t)


@pytest.mark.parametrize(
    "settings",
    [
        {"predict": "x0"},
        {"loss": "edm"},
        {"noise_scale": 0.0},
        {"t_eps": 0.0},
        {"t_eps": 1.0},
        {"timestep_scale": -1.0},
        {"sigma_data": 0.0},
    ],
)
def test_settings_that_make_no_objective_are_refused(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))} must be"):
        Objective(**settings)


def test_check_warns_of_predictions_that_failed_over_large_patches(capsys):
    name = "imagenet256_jit_b16"
    for override, warned in [
        ("objective.predict=image", False),
        ("objective.predict=velocity", True),
        ("objective.predict=edm", True),
        ("objective={_target_: diffusion_pl.objectives.edm.EDM}", True),
    ]:
        assert main(["check", name, override]) == 0
        assert ("over patches of 16 pixels" in capsys.readouterr().out) == warned
    small = ["network.patch_size=4", "network.resolution=64", "data.dataset.resolution=64"]
    assert main(["check", name, "objective.predict=velocity", *small]) == 0
    assert "over patches" not in capsys.readouterr().out


def test_a_network_that_takes_no_augmentation_is_refused_before_training(tmp_path, capsys):
    node = (
        "network={_target_: diffusion_pl.networks.jit.JiT, resolution: 32, patch_size: 4, "
        "width: 16, depth: 1, heads: 1, class_tokens: 0}"
    )
    words = ["tells the network 9 numbers of each image, and this network takes 0"]
    for overrides in ([node], ["network.augment=0"]):
        assert main(["check", "cifar10_edm", *overrides]) == 2
        assert words[0] in capsys.readouterr().err
    assert main(["check", "cifar10_edm", node, "augment=null"]) == 0
    assert main(["check", "cifar10_edm", "augment=null"]) == 0  # and the other way round is fine
    augment = {"_target_": "diffusion_pl.data.augment.NonLeaky"}
    experiment = dp.experiment("quickstart").replace({"augment": augment})
    with pytest.raises(UserError, match=words[0]):
        dp.train(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Sampling.


def test_equal_steps_are_equal_in_t_and_begin_at_pure_noise():
    sigmas = levels(Along(Straight(2.0), 0.0, 1.0), 50, EqualSteps())
    t = 2 / (2 + sigmas)
    assert t[0] == pytest.approx(1e-6, rel=1e-4)
    assert t[1:].tolist() == pytest.approx([i / 50 for i in range(1, 51)], abs=1e-12)
    for steps in (0, 10**6 + 1):
        with pytest.raises(UserError, match="EqualSteps: needs"):
            EqualSteps()(steps)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_heun_in_t_is_heuns_method_on_z(scale):
    world = Gaussian(0.3, 0.5)
    sigmas = levels(Along(Straight(scale), 0.0, 1.0), 12, EqualSteps())
    start = torch.randn(2, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    state = start * float(sigmas[0])
    found = heun(world.denoise, state, sigmas, torch.randn_like, noise_scale=scale)
    times = (scale / (scale + sigmas)).tolist()

    def velocity(z, t):
        sigma = torch.tensor(scale * (1 - t) / t, dtype=F64)
        return (world.denoise(z / t, sigma) - z) / (1 - t)

    z = state * times[0]
    for now, after in pairwise(times):
        slope = velocity(z, now)
        ahead = z + (after - now) * slope
        if after < 1:
            slope = (slope + velocity(ahead, after)) / 2
        z = z + (after - now) * slope
    torch.testing.assert_close(found, z, rtol=1e-9, atol=1e-9)
    plain = heun(world.denoise, state, sigmas, torch.randn_like)
    assert (plain - z).abs().max() > 0.1 * z.abs().max()  # the error that it would be
    for wrong in ({"noise_scale": 0.0}, {"noise_scale": 1.0, "alpha": 0.5}):
        with pytest.raises(UserError, match="noise_scale must be positive"):
            heun(world.denoise, state, sigmas, torch.randn_like, **wrong)
    assert integrator("flow_heun").keywords == {"noise_scale": 1.0}


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_velocity_clamp_leaves_the_noise_that_it_leaves(scale):
    image = torch.full((1, 1, 2, 2), 0.5, dtype=F64)

    def perfect(x, sigma, **more):
        return image.float()

    noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    schedule = Along(Straight(scale), 0.0, 1.0)
    clamp = VelocityClamp(noise_scale=scale)
    method = partial(heun, noise_scale=scale)
    sampler = Sampler(method, schedule, 50, EqualSteps(), velocity_clamp=clamp)
    found = sampler(perfect, noise, torch.randn_like).double()
    # 50 steps end at 0.982864 x + 0.017136 s eps; 10 and 20 never come below t_eps.
    expected = 0.982864 * image + 0.017136 * scale * noise.double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    for steps in (10, 20):
        sampler = Sampler(method, schedule, steps, EqualSteps(), velocity_clamp=clamp)
        found = sampler(perfect, noise, torch.randn_like).double()
        torch.testing.assert_close(found, image, rtol=1e-5, atol=1e-5)
    both = clamp(lambda x, sigma, **more: torch.cat([image.float(), x.float()], dim=1))
    x = torch.ones(1, 1, 2, 2)
    assert torch.equal(both(x, torch.tensor(0.01))[:, 1:], x)  # a variance is left alone
    for wrong in ({"t_eps": 0.0}, {"t_eps": 1.0}, {"noise_scale": 0.0}):
        with pytest.raises(UserError, match="must be"):
            VelocityClamp(**wrong)


def test_the_clamp_is_of_every_walk_through_the_levels():
    sampler = Sampler(euler, Rho(0.02, 2.0), 4, clip_denoised=0.1, velocity_clamp=VelocityClamp())
    x, sigma = torch.full((1, 1, 2, 2), 3.0), torch.tensor(0.02)
    found = sampler.limited(lambda x, sigma, **more: torch.ones_like(x))(x, sigma)
    r = 0.02 / 1.02 / 0.05
    torch.testing.assert_close(found, (1 - r) / 1.02 * x + r * 0.1)


def test_flow_heun_steps_with_the_objectives_scale_of_the_noise():
    given = sampling.integrator_of("flow_heun")
    for own, objective, scale in [
        (euler, Objective(noise_scale=2.0), 2.0),
        (partial(heun, noise_scale=3.0), Objective(), 3.0),
        (heun, EDM(), 1.0),
    ]:
        assert sampling.fitted(given, own, objective).keywords == {"noise_scale": scale}


@torch.no_grad()
def test_an_image_is_inverted_in_the_time_of_the_runs_own_steps():
    world = Gaussian(0.3, 0.5)
    image = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sigmas = levels(Along(Straight(), 0.0, 1.0), 50, EqualSteps())

    def error(integrate):
        state = invert(world.denoise, image, sigmas, integrate)
        again = integrate(world.denoise, state, sigmas, torch.zeros_like)
        return float((again - image).abs().max())

    own = latents.ode_integrator(None, partial(heun, noise_scale=1.0))
    assert error(own) < 1e-4 < 1e-2 < error(heun)
    assert latents.ode_integrator(None, euler) is heun
    assert latents.ode_integrator("flow_heun", own).keywords == {"noise_scale": 1.0}


def test_pure_noise_is_no_untrained_level_where_time_hardly_changes():
    objective = Objective()
    sampler = Sampler(euler, Along(Straight(), 0.0, 1.0), 50, EqualSteps())
    assert sampling.untrained_levels(sampler, objective) is None
    far = Sampler(euler, Along(Straight(), 0.0, 1.0), 2000, EqualSteps())
    assert "untrained beyond" not in str(sampling.untrained_levels(sampler, objective))
    # At the other end details are still drawn.
    for low, said in [(0.02, False), (0.002, True)]:
        given = Sampler(euler, Rho(low, 80.0), 10)
        assert ("untrained beyond" in str(sampling.untrained_levels(given, objective))) == said
    narrow = Objective(std=0.1)
    assert "untrained beyond" in str(sampling.untrained_levels(far, narrow))


# Checkpoints.


def checkpoint(fixture, path, **args):
    averaged = {key: value + 0.01 for key, value in fixture.weights.items()}
    averaged["net.pos_embed"] = fixture.weights["net.pos_embed"]
    content = {"model": averaged, "model_ema1": fixture.weights, "model_ema2": averaged}
    torch.save(content | {"epoch": 3, "args": argparse.Namespace(**args)}, path)
    return path


SAID = {
    "noise_scale": 2.0, "t_eps": 0.04, "proj_dropout": 0.2, "img_size": 32,
    "label_drop_prob": 0.2, "P_mean": -0.3, "P_std": 0.9,
}  # fmt: skip


def test_a_training_checkpoint_comes_in_and_goes_out(fixture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint(fixture, Path("last.pth"), **SAID)
    assert main(["import", "jit", "last.pth", "runs/a", "--set", "in_context_start=2"]) == 0
    read = config.load("runs/a/config.yaml", ())
    assert read.get("objective.noise_scale") == 2.0
    assert read.get("objective.t_eps") == 0.04
    assert read.get("network.dropout") == 0.2
    assert read.get("trainer.dropout.label") == 0.2
    assert read.get("objective.mean") == -0.3
    assert read.get("sampler.integrate.noise_scale") == 2.0
    assert read.get("sampler.schedule.path.shift") == 2.0
    assert read.get("sampler.velocity_clamp.t_eps") == 0.04
    assert main(["export", "runs/a", "out.pth", "--format", "jit"]) == 0
    written = torch.load("out.pth", weights_only=True)
    for key, value in fixture.weights.items():
        torch.testing.assert_close(written["model_ema1"][key], value, rtol=0, atol=2e-7)
    assert main(["import", "jit", "out.pth", "runs/b"]) == 0  # nothing is asked
    again = config.load("runs/b/config.yaml", ())
    for key in ("objective", "sampler", "network", "trainer.dropout.label"):
        assert again.get(key) == read.get(key), key
    # Half-precision files are the same model, rounded.
    half = {key: value.to(torch.bfloat16) for key, value in fixture.weights.items()}
    torch.save({"model_ema1": half, "model": half, "args": SAID}, "half.pth")
    assert main(["import", "jit", "half.pth", "runs/h", "--set", "in_context_start=2"]) == 0
    capsys.readouterr()
    raw = jit.read(Path("last.pth"), {}, "raw")[1]
    second = jit.read(Path("last.pth"), {"ema_decay": 0.9996})[1]
    first = jit.read(Path("last.pth"), {})[1]
    assert all(torch.equal(raw[key], second[key]) for key in raw)
    assert not torch.equal(raw["final_layer.linear.bias"], first["final_layer.linear.bias"])


@pytest.mark.parametrize(
    ("args", "words", "message"),
    [
        ({}, [], "it does not say in_context_start, noise_scale, t_eps, label_drop_prob, P_mean"),
        (SAID, ["in_context_start=2", "ema_decay=[1]"], "ema_decay: must be one of 0.9999, 0.9996"),
        (SAID, [], "in_context_start: it does not say in_context_start; the paper's are --set "),
        (SAID | {"model": "JiT-B/16"}, [], "the weights are those of no published model, not of "),
        (SAID | {"model": "DiT-B"}, [], "model: must be such as JiT-B/16, of B, L, H, G"),
        (SAID, ["in_context_start=9"], "class_tokens_from must be a block from 0 to 5 (got 9)"),
        (SAID, ["in_context_start=2", "ema_decay=0.5"], "ema_decay: must be one of 0.9999, 0.9996"),
        (SAID | {"attn_dropout": 0.1}, ["in_context_start=2"], "attn_dropout: must be 0.0"),
        (SAID | {"t_eps": "x"}, ["in_context_start=2"], "t_eps: must be a positive number"),
        (SAID | {"proj_dropout": 2}, ["in_context_start=2"], "proj_dropout: must be in [0, 1)"),
        (SAID, ["in_context_start=2", "depth=5"], "blocks.5."),
        (SAID, ["in_context_start=2", "hidden=5"], "hidden: is no argument of JiT"),
    ],
)
def test_what_a_checkpoint_does_not_say_or_does_not_fit_is_named(
    fixture, tmp_path, capsys, args, words, message
):
    path = checkpoint(fixture, tmp_path / "last.pth", **args)
    settings = [word for one in words for word in ("--set", one)]
    assert main(["import", "jit", str(path), str(tmp_path / "run"), *settings]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_weights_of_another_size_name_the_one_that_they_fit():
    shapes = {"hidden_size": 1024, "depth": 24, "num_heads": 16, "bottleneck_dim": 128}
    said = shapes | {"patch_size": 32}
    assert jit.size_of("JiT-L/32", said) == 8
    for name in ("JiT-B/32", "JiT-L/16"):
        with pytest.raises(UserError, match=f"those of JiT-L/32, not of {name}"):
            jit.size_of(name, said)


def test_files_of_others_and_other_tables_are_refused(fixture, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="is not in JiT's layout"):
        jit.read(tmp_path / "a.pth")
    moved = dict(fixture.weights)
    moved["net.pos_embed"] = moved["net.pos_embed"].flip(1)
    with pytest.raises(UserError, match="pos_embed: is not the fixed table"):
        jit.denoiser_from(fixture.config, moved)
    torch.save({"model": fixture.weights}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="holds no model_ema1"):
        jit.read(tmp_path / "b.pth")


def test_only_a_jit_with_its_objective_is_written_as_one(tmp_path):
    path = tmp_path / "out.pth"
    for network, objective in [
        (nn.Identity(), Objective()),
        (tiny(), Objective(predict="velocity")),
        (tiny(), Objective(loss="image")),
        (tiny(), dataclasses.replace(Objective(), weight=EpsWeight())),
        (tiny(position_frequencies=1), Objective()),
        (tiny(classes=0, class_tokens=0), Objective()),
        (tiny(convolution=3), Objective()),
    ]:
        with pytest.raises(UserError, match="JiT"):
            jit.write(objective.denoiser(network), objective, 0.1, 16, path)
    assert not path.exists()
