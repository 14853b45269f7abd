"""EDM2's network: magnitudes by arithmetic, published sizes, and what the released code puts out.

The recorded numbers are of the peer's own library, github.com/NVlabs/edm2 as of 2024, its float32
made float64: its network, weights filled by `filled`, at every 41st number of the output.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from test_training import experiment
from torch import distributed, nn
from torch.distributed import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from diffusion_pl import config as configs
from diffusion_pl.config import Config
from diffusion_pl.interop import edm2
from diffusion_pl.networks.edm2_layers import (
    SILU,
    CosineAttention,
    UnitFourier,
    UnitLayer,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
)
from diffusion_pl.networks.edm2_unet import Block, EDM2UNet
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.objectives.edm2 import EDM2
from diffusion_pl.signals import StopRequest
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import sharding
from diffusion_pl.training.run import fit

F64 = torch.float64
SMALL = {"model_channels": 64, "channel_mult": (1, 2), "blocks": 1, "attention": (8,)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def magnitude(x, dims=None):
    return x.square().mean(dims).sqrt()


# Karras 2024, Table 2, in millions; to the last one as the released code has at 64 pixels.
@pytest.mark.parametrize(
    ("width", "millions", "exact"),
    [
        (128, 125, 124_710_821),
        (192, 280, 280_209_253),
        (256, 498, 497_803_045),
        (320, 777, 777_492_197),
        (384, 1119, 1_119_276_709),
        (448, 1523, 1_523_156_581),
    ],
)
def test_every_size_has_the_published_number_of_parameters(width, millions, exact):
    with torch.device("meta"):
        network = EDM2UNet(64, classes=1000, model_channels=width)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert (round(count / 1e6), count) == (millions, exact)


def test_silu_of_a_standard_normal_has_the_papers_magnitude():
    x = torch.linspace(-12, 12, 100_001, dtype=F64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    square = torch.trapezoid(nn.functional.silu(x).square() * density, x).item()
    assert round(math.sqrt(square), 3) == SILU
    assert torch.trapezoid(mp_silu(x).square() * density, x).item() == pytest.approx(1, abs=3e-3)


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.8])
def test_a_sum_of_independent_units_is_a_unit_of_the_asked_mixture(t):
    one, none = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    of_a, of_b = mp_sum(one, none, t).item(), mp_sum(none, one, t).item()
    assert of_a**2 + of_b**2 == pytest.approx(1)  # variances add
    assert of_b / of_a == pytest.approx(t / (1 - t))


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_joined_tensors_of_any_widths_keep_magnitude_and_have_their_share(t):
    a, b = torch.ones(2, 6, 3, 3, dtype=F64), -torch.ones(2, 10, 3, 3, dtype=F64)
    joined = mp_cat(a, b, t)
    assert joined.shape == (2, 16, 3, 3)
    assert magnitude(joined).item() == pytest.approx(1)
    left, right = joined[:, :6], joined[:, 6:]
    assert (left > 0).all() and (right < 0).all()
    # A layer over all channels sees each by its root of the summed square.
    assert (right.norm() / left.norm()).item() == pytest.approx(t / (1 - t))


@pytest.mark.parametrize("dims", [(1,), (1, 2, 3)])
def test_normalising_divides_by_the_root_mean_square(dims):
    x = 7 * torch.randn(3, 5, 4, 4, dtype=F64)
    root = x.square().mean(dims, keepdim=True).sqrt()
    torch.testing.assert_close(normalize(x, dims), x / (root + 1e-4))
    zeros = torch.zeros(1, 4, 2, 2, requires_grad=True)
    normalize(zeros, (1,)).sum().backward()
    assert torch.equal(normalize(zeros, (1,)), zeros) and zeros.grad.isfinite().all()
    # The norm of 64 such numbers is more than half precision holds.
    half = torch.full((1, 64, 1, 1), 30_000.0, dtype=torch.float16)
    torch.testing.assert_close(normalize(half, (1,)), torch.ones_like(half), rtol=1e-3, atol=0)


def test_fourier_features_are_cosines_of_unit_magnitude():
    layer = UnitFourier(20_000)
    features = layer(torch.tensor([-1.3, 0.4]))
    assert features.dtype == torch.float32
    torch.testing.assert_close(magnitude(features, 1), torch.ones(2), rtol=0.02, atol=0)
    # Frequencies are standard normal and phases uniform, both in turns.
    assert layer.freqs.std().item() == pytest.approx(2 * math.pi, rel=0.02)
    assert layer.phases.min() >= 0 and layer.phases.max() <= 2 * math.pi
    assert layer.phases.mean().item() == pytest.approx(math.pi, rel=0.02)
    layer.freqs.fill_(2 * math.pi), layer.phases.fill_(math.pi / 2)
    found = layer(torch.tensor([0.0, 0.25, 0.5]))[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.0, -math.sqrt(2), 0.0]), atol=1e-5, rtol=0)
    assert list(layer.state_dict()) == ["freqs", "phases"]


@pytest.mark.parametrize("side", [None, 1, 3])
def test_a_layers_rows_have_norm_one_at_any_stored_scale(side):
    layer = UnitLayer(6, 9, side).double()
    x = torch.randn((2, 6) if side is None else (2, 6, 5, 5), dtype=F64)
    stored = layer.weight.detach().clone()
    rows = (stored / stored.flatten(1).norm(dim=1).reshape(-1, *[1] * (stored.ndim - 1))).to(F64)
    expected = x @ rows.T if side is None else nn.functional.conv2d(x, rows, padding=side // 2)
    # eps is 1e-4 of a magnitude near 1.
    torch.testing.assert_close(layer(x), expected, rtol=5e-4, atol=1e-6)
    gain = torch.tensor([-0.5], dtype=F64)
    torch.testing.assert_close(layer(x, gain), -0.5 * layer(x))
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(1000)
    torch.testing.assert_close(layer(x), before, rtol=5e-4, atol=1e-6)
    layer.force()
    torch.testing.assert_close(layer(x), before, rtol=5e-4, atol=1e-6)
    length = magnitude(layer.weight.detach(), tuple(range(1, layer.weight.ndim)))
    torch.testing.assert_close(length, torch.ones_like(length), rtol=1e-3, atol=0)


def test_a_weight_that_is_spread_over_devices_is_normalised_in_its_parts():
    layer = UnitLayer(6, 9, 3)
    expected = layer.normalized().detach()
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        spread = sharding.shard(layer.weight, DeviceMesh("cpu", [0]))
        layer.weight = nn.Parameter(spread)
        layer.force()
        assert isinstance(layer.weight.data, DTensor)
        torch.testing.assert_close(sharding.part(layer.weight), expected)
    finally:
        distributed.destroy_process_group()


def test_a_layers_gradient_is_at_right_angles_to_its_rows():
    layer = UnitLayer(6, 4, 3).double()
    layer(torch.randn(2, 6, 5, 5, dtype=F64)).square().sum().backward()
    inner = (layer.weight * layer.weight.grad).flatten(1).sum(1)
    scale = layer.weight.flatten(1).norm(dim=1) * layer.weight.grad.flatten(1).norm(dim=1)
    assert (inner / scale).abs().max() < 1e-3  # eps alone


def test_attention_is_softmax_of_normalised_queries_and_keys():
    layer = CosineAttention(8, 2, 0.3).double()
    x = torch.randn(2, 8, 3, 4, dtype=F64)
    qkv = layer.qkv(x).reshape(2, 2, 4, 3, 12)
    unit = qkv / (qkv.square().mean(2, keepdim=True).sqrt() + 1e-4)
    q, k, v = unit.unbind(3)
    scores = torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(4)
    attended = torch.einsum("nhqk,nhck->nhcq", scores.softmax(3), v).reshape(2, 8, 3, 4)
    expected = (0.7 * x + 0.3 * layer.proj(attended)) / math.sqrt(0.58)
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="10 channels do not divide over 3 heads"):
        CosineAttention(10, 3, 0.3)


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_a_block_keeps_the_magnitude_of_what_it_is_given(decoder, attention):
    make = partial(Block, 128, embedding=64, decoder=decoder, dropout=0.0, attention=attention)
    embedding = torch.randn(4, 64)
    for width in (128, 64):
        block = make(width)
        block.affine_gain.fill_(0.0)
        got = magnitude(block(torch.randn(4, 128, 32, 32), embedding))
        # Zeros beyond the edge cost 2 % of the branch, attention to many averages values away.
        assert got.item() == pytest.approx(1, rel=0.15 if attention else 0.04)


@torch.no_grad()
def test_untrained_networks_have_unit_magnitude_in_every_block_on_average():
    # The rows of one network all see much the same features, so one draw of 64 rows is off by
    # more than the average over networks, of which the paper speaks.
    seen, last, embeddings = {}, [], []
    for _ in range(8):
        network = EDM2UNet(32, classes=4, **(SMALL | {"attention": ()}))
        network.middle[0].attention = None  # it averages the values of noise away
        for name, block in network.named_modules():
            if isinstance(block, Block):
                block.register_forward_hook(
                    lambda *call, name=name: seen.setdefault(name, []).append(call[2])
                )
        network.out_gain.fill_(2.0)  # of 0 at first
        x, c_noise, label = torch.randn(1, 3, 32, 32), torch.randn(1), torch.tensor([3])
        last.append(network(x, c_noise, label=label))
        embeddings.append(network.embed(c_noise, label))
    assert len(seen) == 10
    for name, outputs in seen.items():
        # Doubling keeps it, halving is followed by pixel norm; edges cost a few percent.
        assert magnitude(torch.cat(outputs)).item() == pytest.approx(1, rel=0.08), name
    assert magnitude(torch.cat(embeddings)).item() == pytest.approx(1, rel=0.05)
    assert magnitude(torch.cat(last)).item() == pytest.approx(2, rel=0.1)


def test_the_image_is_seen_beside_a_channel_of_ones():
    network = EDM2UNet(8, channels=2, **SMALL)
    seen = []
    network.stem.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 2, 8, 8)
    network(x, torch.zeros(2))
    torch.testing.assert_close(seen[0], torch.cat([x, torch.ones(2, 1, 8, 8)], dim=1))


def test_activations_are_clipped_where_that_is_asked():
    make = partial(Block, 8, 8, embedding=8, decoder=True, dropout=0.0)
    x, embedding = 100 * torch.randn(1, 8, 4, 4), torch.zeros(1, 8)
    whole = make(clip=None)
    cut = make(clip=20.0)
    cut.load_state_dict(whole.state_dict())
    torch.testing.assert_close(cut(x, embedding), whole(x, embedding).clamp(-20, 20))
    assert whole(x, embedding).abs().max() > 20


@torch.no_grad()
def test_the_label_has_its_share_of_the_embedding_and_none_has_none():
    network = EDM2UNet(16, classes=5, **SMALL, label_balance=0.4)
    c_noise, label = torch.tensor([0.3, -0.2]), torch.tensor([2, -1])
    noise = network.map_noise(network.fourier(c_noise))
    row = network.map_label.normalized()[:, 2]  # 1 / sqrt(5), times sqrt(5)
    rows = torch.stack([row, torch.zeros_like(row)])
    expected = mp_silu((0.6 * noise + 0.4 * rows) / math.hypot(0.6, 0.4))
    torch.testing.assert_close(network.embed(c_noise, label), expected, rtol=1e-3, atol=1e-3)


def test_a_training_run_stores_normalised_weights(tmp_path):
    network = EDM2UNet(16, model_channels=8, channel_mult=(1, 2), blocks=1, attention=())
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, UnitLayer):
                layer.weight.mul_(30)
    settings = {"dropout": {"label": 0.0}, "checkpoint_every": 8}
    made = experiment(16, network=network, objective=EDM2(channels=4), settings=settings)
    fit(made, tmp_path, tmp_path / "references", StopRequest())
    state = checkpoints.load(checkpoints.latest(tmp_path / "checkpoints"))["state_dict"]
    weights = [value for key, value in state.items()
               if key.startswith("denoiser.") and key.endswith("weight")]  # fmt: skip
    assert len(weights) > 20
    for weight in weights:  # but for one step of at most 2e-3 an element, over an average's 30
        length = magnitude(weight, tuple(range(1, weight.ndim)))
        torch.testing.assert_close(length, torch.ones_like(length), rtol=5e-3, atol=0)


def test_the_objective_is_edms_with_the_papers_levels_and_a_learned_weight():
    objective = EDM2(P_mean=-0.4, P_std=1.0, sigma_data=0.7, channels=6)
    image, noise = torch.randn(2, 4, 3, 5, 5, dtype=torch.float32)
    u = torch.tensor([0.1, 0.5, 0.7, 0.95], dtype=F64)
    sigma = torch.exp(-0.4 + torch.special.ndtri(u)).float()
    with torch.no_grad():
        objective.weight.normal_()
    log_loss = objective.log_loss(sigma)
    level = sigma.reshape(-1, 1, 1, 1)
    error = (0.9 * (image + level * noise) - image).square().mean((1, 2, 3))
    weight = (sigma**2 + 0.7**2) / (sigma * 0.7) ** 2
    expected = weight * error / log_loss.exp() + log_loss  # Eq. 14, 15 and 21, a pixel's mean
    got = objective.loss(lambda x, sigma: 0.9 * x, image, u, noise)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    plain = EDM2()  # pixels, Table 6
    assert plain.schedule == EDM(-0.8, 1.6).schedule
    assert plain.preconditioning == EDM(sigma_data=0.5).preconditioning
    assert plain.frequency.shape == (128,)


CONFIG = {
    "precond": "Precond", "encoder": "StandardRGBEncoder", "P_mean": -0.8, "P_std": 1.6,
    "sigma_data": 0.5, "img_resolution": 8, "img_channels": 3, "label_dim": 4, "model_channels": 8,
    "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8,
    "dropout": 0.2,
}  # fmt: skip
# Every option other than it is left out.
OTHER = CONFIG | {
    "label_dim": 0, "channel_mult_noise": 2, "channel_mult_emb": 3, "label_balance": 0.4,
    "concat_balance": 0.3, "res_balance": 0.2, "attn_balance": 0.6, "clip_act": 1.5,
    "resample_filter": [1, 3, 3, 1], "sigma_data": 0.6,
}  # fmt: skip
RECORDED = {
    "usual": (
        CONFIG,
        [
            -6.2459895119, -5.4746873677, 4.5178736757, -12.5874627608, -8.8813651463,
            1.3510303217, 3.9015101560, -5.0633320611, -2.1308171214, -3.1301246891,
            -1.1677045020, -2.4916996196, -1.5914852230, -3.6350708025, -3.9679347017,
        ],
        25.4175321642,
    ),
    "other": (
        OTHER,
        [
            -2.4560932121, -1.2983424061, -6.2845149107, 0.4439616053, -0.5239772686,
            1.0343984802, -0.4491208830, -1.4015332109, -0.3228534948, 0.6959416507,
            -0.6216146856, -1.7290499265, -0.1477338406, 4.9488063611, 0.0058934292,
        ],
        8.6695830967,
    ),
}  # fmt: skip


def wave(shape, number):
    """Numbers that look random and are the same everywhere."""
    count = torch.arange(1, torch.Size(shape).numel() + 1, dtype=F64)
    return torch.sin(count**1.5 * 0.37 + number).reshape(shape)


def filled(config):
    """Weights under the published names, float64: waves of 3, gains between 1 and 3."""
    with torch.device("meta"):
        network = configs.build(Config("", "", edm2.nodes(config)), "network")
    shapes = {theirs: (network.state_dict()[ours].shape, ours)
              for ours, theirs in edm2.names(config, network)}  # fmt: skip
    return {
        key: 2 + wave((), number) if ours.endswith("gain") else 3 * wave(shape, number)
        for number, (key, (shape, ours)) in enumerate(sorted(shapes.items()))
    }


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_the_output_is_the_released_codes(name):
    config, values, square = RECORDED[name]
    network = configs.build(Config("", "", edm2.nodes(config)), "network").double().eval()
    network.load_state_dict(edm2.weights(config, filled(config)))
    sigma, label = torch.tensor([0.02, 0.7, 40.0], dtype=F64), torch.tensor([1, 3, -1])
    label = label if config["label_dim"] else None
    output = network(3 * wave((3, 3, 8, 8), 5), sigma.log() / 4, label=label)
    expected = torch.tensor(values, dtype=F64)
    torch.testing.assert_close(output.flatten()[::41], expected, rtol=1e-9, atol=2e-10)
    assert output.square().mean().item() == pytest.approx(square, rel=1e-9)
