"""Losses beside an objective's own: their definitions, what trains and what stays frozen, runs."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import ClassVar

import pytest
import torch
from test_training import experiment, same
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import diffusion_pl as dp
from diffusion_pl import config
from diffusion_pl.commands import check, parts
from diffusion_pl.diffusion.extra import Alignment, Perceptual, WithExtra, distance
from diffusion_pl.diffusion.objective import needing_network
from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.diffusion.uncertainty import LearnedUncertainty
from diffusion_pl.errors import UserError
from diffusion_pl.metrics import shapes
from diffusion_pl.metrics.feature_maps import Inception, Shapes, Torchvision, as_map
from diffusion_pl.networks.adm import ADM
from diffusion_pl.networks.edm2_unet import EDM2UNet
from diffusion_pl.networks.jit import JiT
from diffusion_pl.networks.linear_unet import LinearUNet
from diffusion_pl.networks.routing import Routing
from diffusion_pl.networks.simple_unet import SimpleUNet
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.networks.uvit import UViT
from diffusion_pl.objectives.ddpm import DDPM, DDPMBound
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.objectives.edm2 import EDM2
from diffusion_pl.objectives.edm_iddpm import IDDPM
from diffusion_pl.objectives.improved_ddpm import ImportanceSampled, ImprovedDDPM
from diffusion_pl.objectives.jit import JiT as JiTObjective
from diffusion_pl.objectives.rectified_flow import RectifiedFlow
from diffusion_pl.objectives.shifted_cosine import ShiftedCosine
from diffusion_pl.objectives.simple_diffusion import SimpleDiffusion
from diffusion_pl.objectives.simpler_diffusion import SimplerDiffusion
from diffusion_pl.objectives.ve import VE
from diffusion_pl.objectives.vp import VP
from diffusion_pl.signals import StopRequest
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.run import fit

SIDE = 16
TOKENS = SIDE // 4


class Halves(nn.Module):
    """A frozen network whose maps are written down here: the image times 2 + x, and its mean."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images):
        first = images * self.scale + images.square()
        return first, nn.functional.avg_pool2d(first, 2)


class Maps:
    """Names `Halves`."""

    image_channels: ClassVar = (3,)

    def __init__(self):
        self.network = Halves()

    def outline(self, channels, resolution):
        return (3, resolution, resolution), (3, resolution // 2, resolution // 2)

    def check_weights(self):
        pass

    def load(self):
        return self.network


def jit(seed=0, **options):
    torch.manual_seed(seed)
    defaults = {"patch_size": 4, "width": 16, "depth": 4, "heads": 2, "bottleneck": 8,
                "class_tokens": 0}  # fmt: skip
    network = JiT(SIDE, **(defaults | options))
    for each in network.parameters():  # it begins at an output of 0
        nn.init.normal_(each, std=0.1)
    return network


def attached(network, *extra, objective=None, side=SIDE):
    made = WithExtra(objective or EDM(), extra)
    for part in needing_network(made):
        part.attach(network, side)
        part.load()
    return made


def batch(count=4, side=SIDE, seed=1):
    source = torch.Generator().manual_seed(seed)
    image = torch.rand(count, 3, side, side, generator=source) * 2 - 1
    u = torch.linspace(0.1, 0.9, count, dtype=torch.float64)
    return image, u, torch.randn(count, 3, side, side, generator=source)


def unit(x, dim):
    return x / x.square().sum(dim, keepdim=True).sqrt()


# definitions


def test_the_perceptual_loss_is_the_distance_of_features_at_low_noise_alone():
    network = jit()
    image, u, noise = batch()
    sigma = EDM().schedule(u)
    loss = Perceptual(Maps(), 0.3, sigma_max=float(sigma[2]), sigma_min=float(sigma[1]))
    objective = attached(network, loss)
    denoiser = objective.denoiser(network)
    found = objective.loss(denoiser, image, u, noise)
    alone = EDM().loss(denoiser, image, u, noise)
    noisy = image + sigma.float()[:, None, None, None] * noise
    one, other = Halves()(denoiser(noisy, sigma)), Halves()(image)
    # LPIPS, Eq. 1, without weights: written out for both maps.
    expected = sum(
        (unit(a, 1) - unit(b, 1)).square().sum(1).mean((1, 2))
        for a, b in zip(one, other, strict=True)
    )
    assert (expected > 1e-3).all()
    inside = torch.tensor([0.0, 1.0, 1.0, 0.0])  # both ends belong to the window
    torch.testing.assert_close(found - alone, 0.3 * inside * expected, rtol=2e-4, atol=1e-4)


def test_the_distance_of_unit_features_is_two_minus_twice_their_cosine():
    torch.manual_seed(0)
    one, other = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    cosine = (one * other).sum(1) / (one.square().sum(1) * other.square().sum(1)).sqrt()
    torch.testing.assert_close(distance([one], [other]), (2 - 2 * cosine).mean((1, 2)))
    assert (distance([3 * one], [one]) < 1e-10).all()


def hidden_of(network, name, denoiser, image, u, noise, **condition):
    """A module's output, the objective apart."""
    kept = []
    hook = network.get_submodule(name).register_forward_hook(lambda *seen: kept.append(seen[-1]))
    sigma = EDM().schedule(u)
    denoiser(image + sigma.float()[:, None, None, None] * noise, sigma, **condition)
    hook.remove()
    return kept[0]


def test_the_alignment_is_minus_the_mean_cosine_of_projected_tokens_and_features():
    network = jit(classes=3, class_tokens=5, class_tokens_from=1)
    alignment = Alignment(Maps(), 2, weight=2.0, width=8)
    objective = attached(network, alignment)
    for each in objective.extra.parameters():
        nn.init.normal_(each)
    denoiser = objective.denoiser(network)
    image, u, noise = batch()
    label = torch.tensor([0, 1, 2, -1])
    found = objective.loss(denoiser, image, u, noise, label=label)
    alone = EDM().loss(denoiser, image, u, noise, label=label)
    hidden = hidden_of(network, "blocks.2", denoiser, image, u, noise, label=label)
    assert hidden.shape == (4, 5 + TOKENS**2, 16)
    w = list(alignment.projection.parameters())
    silu = nn.functional.silu
    expected = torch.zeros(4)
    for row in range(TOKENS):
        for column in range(TOKENS):
            token = hidden[:, 5 + TOKENS * row + column]
            guess = silu(silu(token @ w[0].T + w[1]) @ w[2].T + w[3]) @ w[4].T + w[5]
            # The last map is 8 x 8 for 4 x 4 tokens: linear, with weights 1 3 3 1 in a row where
            # the filter is twice as wide, of which those beyond the border are left out.
            rows, columns = (triangle(at, 2 * TOKENS) for at in (row, column))
            maps = Halves()(image)[-1]
            target = torch.einsum("bchw,h,w->bc", maps, rows, columns)
            expected -= (unit(guess, 1) * unit(target, 1)).sum(1) / TOKENS**2
    torch.testing.assert_close(found - alone, 2 * expected, rtol=1e-4, atol=2e-4)


class Same(nn.Module):
    def forward(self, images):
        return (images,)


class Pixels(Maps):
    """Names a network that gives the image itself."""

    def __init__(self):
        self.network = Same()

    def outline(self, channels, resolution):
        return ((3, resolution, resolution),)


class Own(nn.Module):
    """A network of the user's own, with a hidden map, and the same as tokens."""

    channels, classes = 3, 0

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 5, 1)
        self.rows = nn.Flatten(2)
        self.tokens = nn.Identity()
        self.leave = nn.Conv2d(5, 3, 1)

    def forward(self, x, c_noise, **condition):
        hidden = self.enter(x)
        tokens = self.tokens(self.rows(hidden).transpose(1, 2))
        return self.leave(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


@pytest.mark.parametrize("module", ["enter", "tokens"])
def test_a_map_s_pixels_are_tokens_row_by_row(module):
    torch.manual_seed(0)
    network = Own()
    alignment = Alignment(Pixels(), module, weight=1.0, width=8)
    objective = attached(network, alignment)
    denoiser = objective.denoiser(network)
    image, u, noise = batch()
    found = objective.loss(denoiser, image, u, noise) - EDM().loss(denoiser, image, u, noise)
    hidden = hidden_of(network, "enter", denoiser, image, u, noise)
    expected = torch.zeros(4)
    for row in range(SIDE):
        for column in range(SIDE):
            guess = alignment.projection(hidden[:, :, row, column])
            target = image[:, :, row, column]
            expected -= (unit(guess, 1) * unit(target, 1)).sum(1) / SIDE**2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_projection_begins_as_published():
    """Xavier-uniform: uniform within sqrt(6 / (in + out)); biases 0."""
    torch.manual_seed(0)
    alignment = Alignment(Maps(), 1, width=64)
    attached(jit(), alignment)
    for layer, ends in zip(alignment.projection[::2], ((16, 64), (64, 64), (64, 3)), strict=True):
        bound = (6 / sum(ends)) ** 0.5
        assert layer.weight.shape == ends[::-1]
        # The largest of at least 192 uniform numbers.
        assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert not layer.bias.any()


def triangle(at, count):
    """Weights of a filter of width 4 around the middle of two pixels."""
    weights = torch.zeros(count)
    for pixel, weight in zip(range(2 * at - 1, 2 * at + 3), (1, 3, 3, 1), strict=True):
        if 0 <= pixel < count:
            weights[pixel] = weight
    return weights / weights.sum()


def test_the_gradient_is_the_sum_of_the_losses_gradients():
    network = jit()
    extra = Perceptual(Maps(), 0.5, 80.0), Alignment(Maps(), 1, 3.0, width=8)
    both = attached(network, *extra)
    image, u, noise = batch()

    def gradients(objective):
        loss = objective.loss(objective.denoiser(network), image, u, noise).sum()
        named = {**dict(network.named_parameters()), **dict(both.named_parameters())}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(named.values(), found, strict=True)
        ]

    whole, alone = gradients(both), gradients(EDM())
    added = [
        [a - b for a, b in zip(gradients(WithExtra(EDM(), [each])), alone, strict=True)]
        for each in extra
    ]
    for total, base, first, second in zip(whole, alone, *added, strict=True):
        torch.testing.assert_close(total, base + first + second, rtol=1e-3, atol=2e-3)
    # Each reaches the network, and the second its own weights.
    size = len(list(network.parameters()))
    for part in added:
        assert sum(float(each.abs().sum()) for each in part[:size]) > 1e-2
    assert all(float(each.abs().sum()) > 0 for each in added[1][size:])
    assert not any(float(each.abs().sum()) for each in added[0][size:])


def test_a_part_of_no_weight_changes_nothing_and_parts_are_reported_without_weights():
    network = jit()
    image, u, noise = batch()
    objective = attached(network, Perceptual(Maps(), 0.0, 80.0), Alignment(Maps(), 1, 0.0, width=8))
    denoiser = objective.denoiser(network)
    for _ in range(2):
        found = objective.loss(denoiser, image, u, noise)
    assert torch.equal(found, EDM().loss(denoiser, image, u, noise))
    said = objective.report()
    assert list(said) == ["extra_0_perceptual", "extra_1_alignment"]
    objective.losses[1].weight = 1.0
    with_it = objective.loss(denoiser, image, u, noise) - found
    torch.testing.assert_close(said["extra_1_alignment"], 2 * with_it.sum(), rtol=1e-3, atol=2e-3)
    assert float(objective.report()["extra_0_perceptual"]) == pytest.approx(
        float(said["extra_0_perceptual"]) / 2
    )


# networks and objectives

NETWORKS = {
    "jit": (partial(JiT, SIDE, patch_size=4, width=16, depth=4, heads=2, bottleneck=8,
                    class_tokens=0), 2),
    "uvit": (partial(UViT, SIDE, model_channels=16, channel_mult=(1, 2), blocks=(1,),
                     transformers=2, heads=2, embedding_channels=16, dropout=0.0), 1),
    "song": (partial(SongUNet, SIDE, model_channels=8, channel_mult=(1, 2), blocks=1,
                     attention=(8,)), "decoder.0"),
    "edm2": (partial(EDM2UNet, SIDE, model_channels=16, channel_mult=(1, 2), blocks=1,
                     attention=(8,)), None),
    "adm": (partial(ADM, SIDE, model_channels=32, channel_mult=(1, 2), blocks=1,
                    attention=(8,)), None),
    "simple": (partial(SimpleUNet, SIDE, model_channels=16, channel_mult=(1, 2),
                       blocks=(1, 1)), None),
    "linear": (partial(LinearUNet, SIDE, model_channels=16, channel_mult=(1, 2)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_tokens_of_every_network_can_be_aligned(name):
    make, block = NETWORKS[name]
    torch.manual_seed(0)
    network = make()
    if block is None or isinstance(block, str):  # the module that is called in the middle
        called = []
        hooks = [
            each.register_forward_hook(lambda *seen, key=key: called.append((key, seen[-1])))
            for key, each in network.named_modules()
        ]
        network(torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1))
        for hook in hooks:
            hook.remove()
        maps = [key for key, output in called if getattr(output, "ndim", 0) == 4 and key]
        block = maps[len(maps) // 2]
    alignment = Alignment(Maps(), block, width=8)
    objective = attached(network, alignment)
    image, u, noise = batch()
    objective.loss(objective.denoiser(network), image, u, noise).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in alignment.parameters())


def objectives():
    table = LinearBetas(8, beta_T=0.4)
    cosine = ShiftedCosine(SIDE, SIDE)
    return {
        "edm": EDM(), "edm2": EDM2(channels=4), "iddpm": IDDPM(), "vp": VP(), "ve": VE(),
        "jit": JiTObjective(), "flow": RectifiedFlow(), "ddpm": DDPM(T=8, beta_T=0.4),
        "bound": DDPMBound(T=8, beta_T=0.4), "hybrid": ImprovedDDPM(T=8),
        "sampled": ImportanceSampled(DDPM(T=8, beta_T=0.4), table, keep=1),
        "simple": SimpleDiffusion(cosine), "simpler": SimplerDiffusion(cosine),
        "uncertain": LearnedUncertainty(EDM(), channels=4),
    }  # fmt: skip


@pytest.mark.parametrize("name", objectives())
def test_every_objective_takes_further_losses(name):
    inner = objectives()[name]
    network = jit(learned_variance=name == "hybrid")
    seen = []

    class Asked(nn.Module):
        weight = 2.0

        def forward(self, image, denoised, sigma):
            seen.append((image, denoised, sigma))
            return (denoised - image).square().flatten(1).mean(1)

    objective = attached(
        network, Asked(), Perceptual(Maps(), 1.0, 1e6), Alignment(Maps(), 1, width=8),
        objective=inner,
    )  # fmt: skip
    image, u, noise = batch()
    denoiser = objective.denoiser(network)
    torch.manual_seed(5)
    found = objective.loss(denoiser, image, u, noise)
    torch.manual_seed(5)
    alone = inner.loss(denoiser, image, u, noise)
    (_, denoised, sigma), said = seen[0], objective.report()
    assert denoised.shape == image.shape and sigma.shape == (4,)
    noisy = image + sigma.float()[:, None, None, None] * noise
    torch.testing.assert_close(denoised, denoiser(noisy, sigma), rtol=1e-4, atol=1e-4)
    added = 2 * said["extra_0_asked"] + said["extra_1_perceptual"] + 0.5 * said["extra_2_alignment"]
    torch.testing.assert_close((found - alone).sum(), added, rtol=1e-3, atol=1e-2)
    assert objective.schedule == inner.schedule
    assert objective.preconditioning == inner.preconditioning


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("module", [1, "blocks.1.attention"])
def test_activation_checkpointing_changes_no_gradient(module, checkpointed):
    network = jit()
    objective = attached(network, Alignment(Maps(), module, 100.0, width=8))
    image, u, noise = batch()
    grads = []
    for again in (False, checkpointed):
        network.activation_checkpointing = again
        network.zero_grad()
        objective.zero_grad()
        objective.loss(objective.denoiser(network), image, u, noise).sum().backward()
        both = [*network.parameters(), *objective.parameters()]
        grads.append([p.grad.clone() for p in both if p.grad is not None])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)
    assert objective.extra[0].hidden is None  # what the backward pass ran again was not kept


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_a_compiled_network_is_aligned_by_the_same_gradient(how):
    found = []
    for compiled in (False, True):
        network = jit()
        objective = attached(network, Alignment(Maps(), 1, 100.0, width=8))
        if compiled and how == "whole":
            network.compile()
        elif compiled:
            for block in network.blocks:
                block.compile()
        for seed in (1, 2):  # the second call is of what the first compiled
            image, u, noise = batch(seed=seed)
            objective.loss(objective.denoiser(network), image, u, noise).sum().backward()
        found.append([p.grad for p in [*network.parameters(), *objective.parameters()]])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_smaller_images_have_their_own_grid():
    network = jit(classes=3, class_tokens=5, class_tokens_from=1)
    objective = attached(network, Alignment(Maps(), 2, width=8))
    image, u, noise = batch(side=8)
    assert torch.isfinite(objective.loss(objective.denoiser(network), image, u, noise)).all()


# what is frozen


def frozen_of(objective):
    return objective.extra[0].features.network


@pytest.mark.parametrize("extractor", [Shapes, Maps])
def test_the_extractor_is_frozen_in_evaluation_mode_and_no_part_of_the_module(extractor):
    objective = attached(jit(), Perceptual(extractor(), 1.0, 80.0))
    network = frozen_of(objective)
    objective.train()
    assert not network.training
    assert list(network.parameters())
    assert not any(p.requires_grad for p in network.parameters())
    assert not list(objective.parameters()) and not objective.state_dict()


def test_features_are_of_float32_under_autocast():
    objective = attached(jit(), Perceptual(Shapes(), 1.0, 80.0))
    image = batch()[0]
    expected = objective.extra[0].features(image)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.extra[0].features(image.bfloat16().float())
    exact = objective.extra[0].features(image.bfloat16().float())
    assert all(map(torch.equal, found, exact)) and found[0].dtype == torch.float32
    assert expected[0].shape == (4, 32, 32, 32) and expected[1].shape == (4, 96, 8, 8)


def extras(extractor=Shapes):
    return Perceptual(extractor(), 20.0, 2.0), Alignment(extractor(), 1, 50.0, width=8)


def made(images=32, objective=None, **options):
    network = jit(classes=8, class_tokens=3, class_tokens_from=1)
    return experiment(images, objective=objective, network=network, **options)


@pytest.fixture
def trained(tmp_path):
    def run(made, name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        fit(made, folder, tmp_path / "references", StopRequest())
        return folder, checkpoints.load(checkpoints.latest(folder / "checkpoints"))

    return run


def test_a_stopped_run_goes_on_to_the_same_bits_with_the_projection(trained):
    before = {key: value.clone() for key, value in shapes.load().state_dict().items()}
    straight = WithExtra(EDM(), extras())
    folder, whole = trained(made(objective=straight), "straight")
    trained(made(16, objective=WithExtra(EDM(), extras())), "stopped")
    _, resumed = trained(made(objective=WithExtra(EDM(), extras())), "stopped")
    same(whole, resumed)
    state = whole["state_dict"]
    own = [key for key in state if key.startswith("objective.")]
    assert len(own) == 6 and all("extra.1.projection" in key for key in own)
    # The bias of the projection began at 0: it was trained.
    assert state["objective.extra.1.projection.4.bias"].abs().min() > 0
    assert not any("features" in key or "extra" in key for key in set(state) - set(own))
    after = {f"network.{k}": v for k, v in frozen_of(straight).network.state_dict().items()}
    assert after and all(torch.equal(after[key], before[key]) for key in after)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss" in row]
    assert len(logged) == 2
    for row in logged:
        assert row["extra_0_perceptual"] > 0 and -1 <= row["extra_1_alignment"] <= 1
    assert logged[1]["extra_1_alignment"] < logged[0]["extra_1_alignment"]


def test_the_logged_parts_add_up_to_the_loss(trained):
    settings = {"device_batch_size": 3, "total_images": 16}
    folder, _ = trained(made(16, settings=settings, objective=WithExtra(EDM(), extras())), "with")
    off = WithExtra(EDM(), [])
    without, _ = trained(made(16, settings=settings, objective=off), "without")
    one, other = (
        json.loads((each / "metrics.jsonl").read_text().splitlines()[0])
        for each in (folder, without)
    )
    # Of two steps the first is from the same weights, so the losses lie near.
    added = 20 * one["extra_0_perceptual"] + 50 * one["extra_1_alignment"]
    assert one["loss"] - added == pytest.approx(other["loss"], rel=0.02)
    assert abs(added) > 0.01 * one["loss"]


def test_accumulation_takes_the_same_steps(trained):
    _, whole = trained(made(16, objective=WithExtra(EDM(), extras())), "whole")
    settings = {"device_batch_size": 3}
    _, cut = trained(made(16, settings=settings, objective=WithExtra(EDM(), extras())), "parts")
    for key, value in whole["state_dict"].items():
        torch.testing.assert_close(cut["state_dict"][key], value, rtol=1e-3, atol=2e-4)


def test_without_further_losses_nothing_changes(trained):
    _, plain = trained(made(16), "plain")
    _, off = trained(made(16, objective=WithExtra(EDM(), [])), "off")
    same(plain, off)


def test_the_network_alone_begins_and_is_drawn_for_as_without(trained):
    """A perceptual loss without weight changes neither initial weights nor noise."""
    _, plain = trained(made(16), "plain")
    none = WithExtra(EDM(), [Perceptual(Shapes(), 0.0, 80.0)])
    _, off = trained(made(16, objective=none), "off")
    for key, value in plain["state_dict"].items():
        torch.testing.assert_close(off["state_dict"][key], value, rtol=1e-6, atol=1e-7)


# experiments

EXTRA = """
defaults: quickstart
objective:
  extra:
    - _target_: diffusion_pl.diffusion.extra.Perceptual
      extractor: {_target_: diffusion_pl.metrics.feature_maps.Shapes}
      weight: 0.1
      sigma_max: 1.0
    - _target_: diffusion_pl.diffusion.extra.Alignment
      extractor: {_target_: diffusion_pl.metrics.feature_maps.Shapes}
      weight: 0.5
      block: 1
      width: 32
"""
VGG = {
    "_target_": "diffusion_pl.metrics.feature_maps.Torchvision",
    "model": "vgg16",
    "layers": ["features.3"],
}


def test_an_experiment_names_them_and_null_takes_them_away():
    read = dp.experiment(EXTRA).config
    objective = config.build(read, "objective")
    assert isinstance(objective, WithExtra)
    assert [type(each) for each in objective.losses] == [Perceptual, Alignment]
    assert objective.losses[0].weight == 0.1 and objective.losses[1].block == 1
    for nothing in (None, []):
        off = dp.experiment(EXTRA, {"objective.extra": nothing}).config
        assert config.build(off, "objective") == config.build(
            dp.experiment("quickstart").config, "objective"
        )


def test_python_objects_name_them_too():
    part = dp.lazy(Alignment, extractor=Shapes(), block=1, weight=0.25, width=16)
    by_lazy = dp.experiment("quickstart").replace(objective=dp.lazy(EDM, extra=[part]))
    by_key = dp.experiment("quickstart", {"objective.extra": [part]})
    for exp in (by_lazy, by_key):
        objective = config.build(exp.config, "objective")
        assert isinstance(objective, WithExtra) and objective.losses[0].weight == 0.25
        module, _ = exp.lightning()
        assert "objective.extra.0.projection.0.weight" in module.state_dict()
        optimizer = module.configure_optimizers()
        optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in module.objective.parameters()} <= held
        assert not any("extra" in key for key in module.ema.state_dict())


def test_an_objective_of_ones_own_that_takes_extra_gets_it(tmp_path, monkeypatch):
    (tmp_path / "ownobjective.py").write_text(
        "from diffusion_pl.objectives.edm import EDM\n"
        "def own(extra=0):\n    return EDM(P_mean=extra)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    read = dp.experiment("quickstart", {"objective": {"_target_": "ownobjective.own", "extra": 3}})
    objective = config.build(read.config, "objective")
    assert objective == EDM(P_mean=3)


def test_a_grouped_optimizer_knows_the_projection_by_its_name():
    group = {"_target_": "diffusion_pl.training.optimizers.Group",
             "names": ["objective.extra.*"], "lr": 1e-5}  # fmt: skip
    adam = {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 1e-3}
    grouped = {"_target_": "diffusion_pl.training.optimizers.Grouped", "rest": adam,
               "groups": [group]}  # fmt: skip
    read = dp.experiment(EXTRA)
    tree = {**read.config.tree, "optimizer": grouped}
    text = json.dumps(tree)
    dp.experiment(text + "\n")
    with pytest.raises(UserError, match="no parameter is called"):
        dp.experiment(
            json.dumps({**tree, "objective": {**tree["objective"], "extra": None}}) + "\n"
        )


def problem(changes, text=EXTRA):
    with pytest.raises(UserError) as error:
        dp.experiment(text, changes)
    said = str(error.value)
    assert "\n" not in said
    return said


def test_what_does_not_fit_is_a_line_before_training():
    assert "objective.extra.1: weight must be at least 0 (got -1.0)" in problem(
        {"objective.extra.1.weight": -1}
    )
    assert "objective.extra.0: weight must be at least 0" in problem(
        {"objective.extra.0.weight": float("-0.5")}
    )
    assert "needs 0 <= sigma_min < sigma_max" in problem({"objective.extra.0.sigma_min": 2})
    said = problem({"objective.extra.1.block": 4})
    assert "objective.extra: block: the network has no 'middle.4'; it has middle.0 to " in said
    assert "the network has no 'nowhere'" in problem({"objective.extra.1.block": "nowhere"})
    assert "it is not called" in problem({"objective.extra.1.block": "middle"})
    assert "width must be at least 1" in problem({"objective.extra.1.width": 0})
    assert "unknown argument of diffusion_pl.diffusion.extra.Perceptual" in problem(
        {"objective.extra.0.sigma": 2}
    )
    assert "is no extra; take one of Alignment, Perceptual" in problem(
        {"objective.extra.0": {"_target_": "diffusion_pl.objectives.edm.EDM"}}
    )
    assert "objective.extra: must be" in problem({"objective.extra": {"a": 1}})
    assert "strategy: fsdp shards the network alone" in problem({"trainer.strategy": "fsdp"})
    assert "vgg16 has no layer features.333; it has such as features, features.1" in problem(
        {"objective.extra.0.extractor": {**VGG, "layers": ["features.333"]}}
    )
    compiled = {"trainer.compile": True, "network.activation_checkpointing": True}
    assert "hides its blocks from Alignment" in problem(compiled)
    assert "torchvision has no classifier 'vgg61'; it has vgg19, vgg16, vgg13" in problem(
        {"objective.extra.0.extractor": {**VGG, "model": "vgg61"}}
    )
    small = {**VGG, "model": "vit_b_16", "layers": ["encoder"]}
    assert "cannot take images of 3 x 16 x 16" in problem({"objective.extra.0.extractor": small})
    assert "Inception has no layer Mixed_9a; it has Conv2d_1a_3x3" in problem(
        {"objective.extra.0.extractor": {
            "_target_": "diffusion_pl.metrics.feature_maps.Inception", "layers": ["Mixed_9a"]}}
    )  # fmt: skip


def test_images_of_other_channels_are_refused():
    network = jit(channels=4)
    with pytest.raises(UserError, match="Shapes takes images of 1 or 3 channels \\(got 4\\)"):
        attached(network, Perceptual(Shapes(), 1.0, 80.0))
    with pytest.raises(UserError, match="Maps takes images of 3 channels \\(got 1\\)"):
        attached(jit(channels=1), Alignment(Maps(), 1))
    grey = attached(jit(channels=1), Perceptual(Shapes(), 1.0, 80.0))
    image = torch.rand(2, 1, SIDE, SIDE)
    maps = zip(
        grey.extra[0].features(image),
        grey.extra[0].features(image.repeat(1, 3, 1, 1)),
        strict=True,
    )
    assert all(torch.equal(one, other) for one, other in maps)


def test_a_block_whose_patches_are_routed_is_refused():
    network = jit(routing=Routing(rate=0.5, first=1, last=2))
    with pytest.raises(UserError, match="blocks.1 has 8 tokens in training, which are no grid"):
        attached(network, Alignment(Maps(), 1))
    attached(network, Alignment(Maps(), 3, width=8))
    # Even where class tokens and kept patches are as many as patches.
    tokens = {"classes": 4, "class_tokens": 8, "class_tokens_from": 0}
    network = jit(routing=Routing(rate=0.5, first=1, last=2), **tokens)
    with pytest.raises(UserError, match="outside of those that routing skips"):
        attached(network, Alignment(Maps(), 2))
    attached(network, Alignment(Maps(), 3, width=8))


def test_torchvision_models_see_images_as_their_weights_did():
    for name, mean in [("vgg16", 0.485), ("efficientnet_v2_l", 0.5)]:
        layer = ["features.1"] if name != "vgg16" else ["features.3"]
        extractor = Torchvision(name, layer)
        assert extractor._maps(extractor._model()).mean[0] == mean
    urls = Torchvision("vgg16", ["features.3"])._addresses()
    assert len(urls) == 1 and "features" not in urls[0]  # those of another normalisation
    assert Torchvision("googlenet", ["conv1"])._model().transform_input
    with pytest.raises(UserError, match=r"layers of swin_t give \(B, h, w, C\), which is not read"):
        Torchvision("swin_t", ["features.3"]).outline(3, 224)


def test_what_is_no_loss_is_refused():
    with pytest.raises(UserError, match="extra.1: Identity is no loss with a `weight`"):
        WithExtra(EDM(), [Perceptual(Maps(), 1.0, 80.0), nn.Identity()])


def test_weights_that_are_not_there_are_said_where_to_get(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    exp = dp.experiment(EXTRA, {"objective.extra.0.extractor": VGG})
    with pytest.raises(UserError) as error:
        dp.train(exp, tmp_path / "run")
    said = str(error.value)
    assert "\n" not in said
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in said
    assert "sha256 begins with 397923af" in said
    assert not (tmp_path / "run").exists()
    objective = config.build(exp.config, "objective")
    assert "Perceptual x 0.1, Alignment x 0.5; extractor: " in check._extra(objective)
    assert parts.missing_weights(objective) is not None
    named = Inception(weights=str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="Inception's weights are not there"):
        named.check_weights()


# extractors


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """A file of weights in torchvision's layout, drawn here, and the network it is of."""
    from torchvision import models

    torch.manual_seed(3)
    network = models.squeezenet1_1(weights=None).eval()
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(network.state_dict(), path)
    return path, network


def test_a_model_of_torchvision_gives_its_layers_for_images_as_it_was_trained(squeezenet):
    path, network = squeezenet
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    named = Torchvision("squeezenet1_1", ["features.3", "features.6"], str(path), digest[:8])
    image = batch(side=64)[0]
    maps = named.load()(image)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((image + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    first = network.features[:4](x)
    torch.testing.assert_close(maps[0], first)
    torch.testing.assert_close(maps[1], network.features[4:7](first))
    assert named.outline(3, 64) == [tuple(each.shape[1:]) for each in maps]
    larger = Torchvision("squeezenet1_1", ["features.3"], str(path), digest, side=128)
    expected = network.features[:4](torch.zeros(4, 3, 128, 128)).shape
    assert larger.load()(image)[0].shape == (4, *larger.outline(3, 64)[0]) == expected


def test_a_file_of_another_digest_or_model_is_refused(squeezenet, tmp_path):
    path, network = squeezenet
    part, state = tmp_path / "part.pth", network.state_dict()
    state.pop("features.0.bias")
    torch.save(state, part)
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="holds no weights of .* Missing key"):
        Torchvision("squeezenet1_1", ["features.3"], str(part), digest).load()
    with pytest.raises(UserError, match="has the sha256 .*, not b8a52dc0\\.\\.\\.; get https://"):
        Torchvision("squeezenet1_1", ["features.3"], str(path)).load()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="holds no weights of torchvision's squeezenet1_0"):
        Torchvision("squeezenet1_0", ["features.3"], str(path), digest).load()
    with pytest.raises(UserError, match="has the sha256 .*, not 00000000\\.\\.\\."):
        Torchvision("squeezenet1_1", ["features.3"], str(path), "0" * 8).load()
    with pytest.raises(UserError, match="sha256 must be 8 to 64 hex digits"):
        Torchvision("squeezenet1_1", ["features.3"], str(path), "B8A52DC0")
    with pytest.raises(UserError, match="name at least one"):
        Torchvision("squeezenet1_1", [])


def test_tokens_become_a_map_without_the_class_token():
    tokens = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    found = as_map(tokens)
    assert found.shape == (2, 3, 2, 2)
    assert torch.equal(found[:, :, 1, 0], tokens[:, 3])
    assert torch.equal(as_map(tokens[:, 1:]), found)
    with pytest.raises(UserError, match="no map"):
        as_map(torch.zeros(2, 7, 3))


def test_inception_gives_the_maps_of_its_own_forward_pass(tmp_path):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        # Its constructor insists on loading a file; here the file is still to be made.
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("n", ["768"], feature_extractor_weights_path="")
    for each in network.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.normal_(each.weight, std=(2 / each.weight[0].numel()) ** 0.5)
        elif isinstance(each, nn.BatchNorm2d):
            each.running_mean.uniform_(-0.1, 0.1)
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    named = Inception(["Mixed_6e", "Mixed_5b"], str(path))
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    objective = attached(jit(), Perceptual(named, 1.0, 80.0))
    with torch.no_grad():
        maps = objective.extra[0].features(image.float() / 127.5 - 1)
        pooled = network.eval()(image)[0]
    assert [tuple(each.shape[1:]) for each in maps] == list(named.outline(3, 32))
    # Of 8 levels of 255 at 2^-24, through some ninety layers whose norms are folded.
    torch.testing.assert_close(maps[1].mean((2, 3)), pooled, rtol=1e-3, atol=1e-4)
