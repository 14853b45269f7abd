"""The networks of simple diffusion: their size, and what every network promises."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from diffusion_pl.networks.position import coordinates
from diffusion_pl.networks.simple_layers import Head, Stem, residual_block
from diffusion_pl.networks.simple_unet import SimpleUNet
from diffusion_pl.networks.uvit import Transformer, UViT
from diffusion_pl.networks.wavelet import analyse, synthesise

SMALL = {"model_channels": 8, "embedding_channels": 16, "heads": 2}
UNET = partial(
    SimpleUNet, 16, channel_mult=(1, 2), blocks=(1, 2), attention=(8, 4), dropout_from=8, **SMALL
)
UVIT = partial(UViT, 16, channel_mult=(1, 2), blocks=(2,), transformers=2, **SMALL)
NETWORKS = {
    "unet": UNET,
    "unet, wavelets": partial(UNET, halvings=1),
    "unet, patches": partial(UNET, halvings=1, reduction="patch"),
    "uvit": UVIT,
    "uvit, patches": partial(UVIT, halvings=1, reduction="patch"),
    "uvit, residual": partial(UVIT, halvings=1, residual=True),
}


def awake(network):
    """Give the layers that begin near zero some weight, so that a change in them shows."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))
    return network


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def image(batch=2, side=16):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


LEVELS = torch.tensor([30.0, 800.0])


@pytest.mark.parametrize("name", ["unet", "uvit", "uvit, residual"])
@torch.no_grad()
def test_skip_connections_carry_the_image_past_the_middle(name):
    network = awake(NETWORKS[name]()).eval()
    # The deepest layers tell nothing of the image any more.
    network.middle[-1].register_forward_hook(lambda layer, inputs, output: 0 * output)
    first = network(image(), LEVELS)
    assert relative(network(image().flip(-1), LEVELS), first) > 1e-3


@torch.no_grad()
def test_a_scale_of_minus_one_silences_what_a_layer_makes_of_x():
    block, transformer = awake(residual_block(8, 8, 4, 0.0)), awake(Transformer(16, 2, 4, 0.0))
    transformer.proj.weight.zero_()
    for layer, shape in ((block, (2, 8, 4, 4)), (transformer, (2, 9, 16))):
        layer.affine.weight.zero_()
        scale, shift = layer.affine.bias.chunk(2)
        shift.zero_()
        for value, silent in ((-1.0, True), (0.5, False)):
            scale.fill_(value)
            added = []
            for seed in (0, 1):
                x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                added.append(layer(x, torch.ones(2, 4)) - x)
            assert torch.allclose(*added, atol=1e-5) is silent


def normalised(x):
    """Group normalisation of 8 channels in two groups."""
    groups = x.reshape(len(x), 2, -1)
    centred = groups - groups.mean(2, keepdim=True)
    return (centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)


def attended(q, k, v):
    """Softmax attention of one head, (B, tokens, channels)."""
    return (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(2) @ v


@torch.no_grad()
def test_a_residual_block_is_what_its_parts_say():
    """Norm, silu, conv; norm scaled and shifted, silu, conv; plus x; then attention, plus x."""
    torch.manual_seed(0)
    block = awake(residual_block(8, 8, 4, 0.0, heads=2))
    for norm in (block.norm0, block.norm1, block.attention.norm):
        norm.reset_parameters()
    x, vector = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    scale, shift = F.linear(vector, block.affine.weight, block.affine.bias)[..., None, None].split(
        8, dim=1
    )
    hidden = F.silu(normalised(block.conv0(F.silu(normalised(x)))) * (1 + scale) + shift)
    between = x + block.conv1(hidden)
    heads = block.attention.qkv(normalised(between)).flatten(2).unflatten(1, (2, 4, 3))
    heads = [attended(*head.permute(2, 0, 3, 1)) for head in heads.unbind(1)]  # (q, k, v)
    out = torch.cat(heads, dim=2).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(block(x, vector), between + block.attention.proj(out))


@torch.no_grad()
def test_a_transformer_is_what_its_parts_say():
    """An MLP of four times the width under the condition, plus x; then attention, plus x."""
    torch.manual_seed(0)
    layer = awake(Transformer(8, 2, 4, 0.0))
    layer.norm0.reset_parameters(), layer.norm1.reset_parameters()
    x, vector = torch.randn(2, 5, 8), torch.randn(2, 4)
    scale, shift = layer.affine(vector)[:, None].split(8, dim=2)
    hidden = F.layer_norm(x, (8,)) * (1 + scale) + shift
    assert layer.dense0.out_features == 32
    between = x + layer.dense1(F.gelu(layer.dense0(hidden)))
    q, k, v = layer.qkv(F.layer_norm(between, (8,))).split(8, dim=2)
    heads = [attended(*(part[..., 4 * n : 4 * n + 4] for part in (q, k, v))) for n in (0, 1)]
    expected = between + layer.proj(torch.cat(heads, dim=2))
    torch.testing.assert_close(layer(x, vector), expected)


@torch.no_grad()
def test_the_stem_makes_images_small_by_wavelets_or_by_patches_that_do_not_overlap():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    by_bands, by_patches = Stem(3, 8, 2, "wavelet"), Stem(3, 8, 2, "patch")
    torch.testing.assert_close(by_bands(x), by_bands.conv(analyse(analyse(x))))
    patches = F.pixel_unshuffle(x, 4)  # (B, C 4 4, H / 4, W / 4)
    weight = by_patches.conv.weight.flatten(1)
    torch.testing.assert_close(by_patches(x), torch.einsum("oi,bihw->bohw", weight, patches))


@torch.no_grad()
@pytest.mark.parametrize("reduction", ["wavelet", "patch"])
def test_the_head_is_a_norm_a_silu_and_a_convolution(reduction):
    torch.manual_seed(0)
    head = awake(Head(8, 3, 1, reduction))
    head.norm.reset_parameters()
    x = torch.randn(2, 8, 4, 4)
    bands = head.conv(F.silu(normalised(x)))
    torch.testing.assert_close(head(x), synthesise(bands) if reduction == "wavelet" else bands)


def test_halvings_at_the_input_count_for_the_resolution():
    for make in (UNET, UVIT):
        network = make(halvings=1)
        network.check_resolution(20, 20)
        with pytest.raises(ValueError, match="multiples of 4"):
            network.check_resolution(18, 18)


@torch.no_grad()
def test_a_transformer_begins_as_the_identity():
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(
        Transformer(16, 2, 8, 0.0)(x, torch.ones(2, 8)), x, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("options", [{"heads": 0}, {"heads": 3}, {"transformers": 0}])
def test_attention_needs_heads_and_a_transformer_to_be_in(options):
    with pytest.raises(ValueError, match="heads of attention|at least 1"):
        UVIT(**options)


# Wavelets.


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 2, 6), (1, 2, 32, 2)])
def test_the_wavelet_transform_is_undone_by_its_inverse(shape):
    x = torch.randn(shape, dtype=torch.float64)
    bands = analyse(x)
    assert bands.shape == (shape[0], 4 * shape[1], shape[2] // 2, shape[3] // 2)
    torch.testing.assert_close(synthesise(bands), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(analyse(synthesise(bands)), bands, rtol=0, atol=1e-14)


def test_the_wavelets_are_the_5_3_filters():
    """Away from the edges: averages by [-1, 2, 6, 2, -1] / 8, details by [-1, 2, -1] / 2."""
    x = torch.randn(1, 1, 32, 1, dtype=torch.float64).expand(1, 1, 32, 8)
    low, across, high, both = analyse(x)[0, :, :, 0]
    line = x[0, 0, :, 0]
    n = 7
    taps = torch.tensor([-1, 2, 6, 2, -1], dtype=torch.float64) / 8
    assert low[n] == pytest.approx(float(taps @ line[2 * n - 2 : 2 * n + 3]))
    taps = torch.tensor([-1, 2, -1], dtype=torch.float64) / 2
    assert high[n] == pytest.approx(float(taps @ line[2 * n : 2 * n + 3]))
    # Nothing changes along the width, so no detail is there.
    assert across.abs().max() < 1e-12
    assert both.abs().max() < 1e-12


def test_a_constant_and_a_ramp_have_no_details_and_edges_are_reflected():
    constant = analyse(torch.full((1, 1, 8, 8), 0.7, dtype=torch.float64))[0]
    torch.testing.assert_close(constant[0], torch.full_like(constant[0], 0.7))
    assert constant[1:].abs().max() < 1e-15
    ramp = torch.arange(8, dtype=torch.float64).expand(1, 1, 8, 8)
    average, detail = analyse(ramp)[0, :2, 0]
    assert detail.tolist() == [0, 0, 0, 1]  # 7 - 6, reflected about 7
    assert average.tolist() == [0, 2, 4, 6.25]


def test_white_noise_comes_out_with_the_known_std():
    noise = torch.randn(1, 1, 2048, 1024, generator=torch.Generator().manual_seed(0))
    inside = analyse(noise)[0, :, 4:-4, 4:-4]
    low, high = 0.8478, 1.2247
    known = [low * low, low * high, high * low, high * high]
    assert inside.std(dim=(1, 2)).tolist() == pytest.approx(known, rel=5e-3)
    assert (low, high) == pytest.approx((math.sqrt(23) / math.sqrt(32), math.sqrt(1.5)), abs=1e-4)


# Size.


def conv(channels_in, channels_out, side=3):
    return (channels_in * side**2 + 1) * channels_out


def block(channels_in, channels_out, attends, length):
    """Parameters of a residual block: two norms, two convolutions, affine, 1 x 1, attention."""
    count = 2 * channels_in + conv(channels_in, channels_out) + 2 * channels_out
    count += conv(channels_out, channels_out) + (length + 1) * 2 * channels_out
    count += conv(channels_in, channels_out, 1) if channels_in != channels_out else 0
    attention = 2 * channels_out + conv(channels_out, 4 * channels_out, 1)
    return count + (attention if attends else 0)


def around(sinusoids, length, classes, width, bands):
    """Parameters of the condition, the stem and the head."""
    condition = (sinusoids + 1) * length + (length + 1) * length + classes * length
    return condition + conv(bands, width) + 2 * width + conv(width, bands)


@pytest.mark.parametrize(
    ("halvings", "parameters"), [(0, 1_114_809_347), (1, 1_114_830_092), (2, 1_114_913_072)]
)
def test_the_u_net_has_the_stated_number_of_parameters(halvings, parameters):
    with torch.device("meta"):
        network = SimpleUNet(128 * 2**halvings, classes=1000, halvings=halvings)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    widths, blocks = [128, 256, 512, 1024, 1024], [3, 4, 4, 12, 4]
    count, width = around(128, 1024, 1000, 128, 3 * 4**halvings), 128
    skips = []
    for level, (wanted, number) in enumerate(zip(widths, blocks, strict=True)):
        for _ in range(number):
            count += block(width, wanted, level >= 3, 1024)
            width = wanted
            skips.append(width)
    count += block(width, width, True, 1024) + block(width, width, False, 1024)
    for level in (4, 3, 2, 1, 0):
        for _ in range(blocks[level]):
            count += block(width + skips.pop(), widths[level], level >= 3, 1024)
            width = widths[level]
    assert count == parameters


@pytest.mark.parametrize(
    ("halvings", "residual", "parameters"),
    [(0, False, 2_028_255_875), (2, False, 2_028_359_600), (0, True, 2_016_893_699)],
)
def test_the_u_vit_has_the_stated_number_of_parameters_near_2_billion(
    halvings, residual, parameters
):
    with torch.device("meta"):
        network = UViT(128 * 2**halvings, classes=1000, halvings=halvings, residual=residual)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert parameters == pytest.approx(2e9, rel=0.02)
    count = around(128, 1024, 1000, 128, 3 * 4**halvings)
    for width, inner in [(128, 256), (256, 512), (512, 2048)]:
        count += 3 * block(width, width, False, 1024)
        count += 3 * block(width if residual else 2 * width, width, False, 1024)
        count += conv(width, inner, 1) + conv(inner, width, 1)
    wide = 2048
    transformer = 4 * wide + (1024 + 1) * 2 * wide + (wide + 1) * 4 * wide + (4 * wide + 1) * wide
    transformer += (wide + 1) * 4 * wide
    assert count + 36 * transformer == parameters


# Where things are.


def test_the_u_net_attends_at_16_and_8_and_drops_out_from_16_down():
    with torch.device("meta"):
        network = SimpleUNet(256, classes=1000, halvings=1)
    attends = [[bool(b.attention) for b in layers] for layers in network.encoder]
    drops = [{b.drop.p for b in layers} for layers in network.encoder]
    assert attends == [[False] * 3, [False] * 4, [False] * 4, [True] * 12, [True] * 4]
    assert drops == [{0.0}, {0.0}, {0.0}, {0.1}, {0.1}]
    assert [{b.drop.p for b in layers} for layers in network.decoder] == drops[::-1]
    assert [b.attention is not None for b in network.middle] == [True, False]
    assert [b.drop.p for b in network.middle] == [0.1, 0.1]
    with torch.device("meta"):
        networks = UNET(heads=2), UVIT(heads=2)
    for network in networks:
        assert {m.heads for m in network.modules() if hasattr(m, "heads")} == {2}


def test_dropout_acts_in_training_only_and_not_at_high_resolution():
    x, vector = torch.randn(1, 8, 4, 4), torch.randn(1, 16)
    for layer, given in [
        (residual_block(8, 8, 16, dropout=0.5), x),
        (Transformer(8, 2, 16, dropout=0.5), x.flatten(2).transpose(1, 2)),
    ]:
        awake(layer).eval()
        assert torch.equal(layer(given, vector), layer(given, vector))
        layer.train()
        assert not torch.equal(layer(given, vector), layer(given, vector))
    with torch.device("meta"):
        uvit = UVIT(dropout=0.3)
    assert {b.drop.p for layers in uvit.encoder for b in layers} == {0.0}
    assert {b.drop.p for b in uvit.middle} == {0.3}


@torch.no_grad()
def test_the_residual_u_vit_passes_around_its_inner_levels():
    """One skip a level: h comes back as Up(y - h_d) + h, so y = h_d leaves h alone."""
    network = awake(UVIT(residual=True)).eval()
    for layer in network.middle:  # transformers that change nothing
        for last in (layer.dense1, layer.proj):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    for layer in network.up:  # of y - h_d = 0
        torch.nn.init.zeros_(layer.bias)
    embedding, x = network.embed(LEVELS), network.stem(image())
    for layer in (*network.encoder[0], *network.decoder[-1]):
        x = layer(x, embedding)
    assert len(network.encoder) == 1
    torch.testing.assert_close(network(image(), LEVELS), network.head(x))
    awake(network)
    with_levels = network(image(), LEVELS)
    torch.nn.init.normal_(network.up[0].weight)
    assert relative(network(image(), LEVELS), with_levels) > 1e-3


@torch.no_grad()
def test_without_residual_skips_the_inner_levels_come_back_as_they_are():
    network, seen = awake(UVIT(residual=False)).eval(), []
    network.middle[-1].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    network.up[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    network(image(), LEVELS)
    tokens, back = seen
    assert torch.equal(back.flatten(2).transpose(1, 2), tokens)


@torch.no_grad()
def test_tokens_attend_to_all_tokens_and_blocks_read_their_condition():
    torch.manual_seed(0)
    layer = awake(Transformer(8, 2, 16, dropout=0.0))
    x, vector = torch.randn(1, 5, 8), torch.randn(1, 16)
    out = layer(x, vector)
    # Attention knows no order.
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(layer(x[:, order], vector), out[:, order])
    other = x.clone()
    other[:, 4, 0] += 1
    assert (layer(other, vector) - out)[:, 0].abs().max() > 1e-4
    assert relative(layer(x, vector + 1), out) > 1e-3
    resblock = awake(residual_block(8, 16, 16, dropout=0.0, heads=2))
    images = torch.randn(1, 8, 4, 4)
    assert relative(resblock(images, vector + 1), resblock(images, vector)) > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_layer_is_read(name):
    network = awake(NETWORKS[name](classes=5)).eval()
    label = torch.tensor([0, 1])
    out = network(image(), LEVELS, label=label)
    for key, parameter in network.named_parameters():
        if parameter.ndim < 2:
            continue
        kept = parameter.clone()
        parameter.add_(0.1 * torch.randn_like(parameter))
        assert not torch.equal(network(image(), LEVELS, label=label), out), key
        parameter.copy_(kept)


# What every network promises.


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_label_changes_the_output_and_minus_one_is_none(name):
    network = awake(NETWORKS[name](classes=5)).eval()
    first = network(image(), LEVELS, label=torch.tensor([0, 1]))
    other = network(image(), LEVELS, label=torch.tensor([0, 2]))
    torch.testing.assert_close(first[0], other[0])
    assert relative(first[1], other[1]) > 1e-4
    none = network(image(), LEVELS, label=torch.tensor([-1, -1]))
    torch.testing.assert_close(none, network(image(), LEVELS))
    with pytest.raises(ValueError, match="without classes"):
        NETWORKS[name]()(image(), LEVELS, label=torch.tensor([0, 1]))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_noise_level_changes_the_output_and_images_do_not_see_one_another(name):
    network = awake(NETWORKS[name]()).eval()
    both = network(image(), LEVELS)
    alone = network(image()[1:], LEVELS[1:])
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)
    assert relative(network(image()[1:], LEVELS[:1]), alone) > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_other_resolutions_that_the_levels_divide_are_taken(name):
    network = awake(NETWORKS[name]()).eval()
    assert network(torch.randn(1, 3, 24, 40), torch.zeros(1)).shape == (1, 3, 24, 40)
    for height, width in ((15, 16), (16, 15)):
        with pytest.raises(ValueError, match=rf"multiples of \d \(got {height} x {width}\)"):
            network(torch.randn(1, 3, height, width), torch.zeros(1))
    with pytest.raises(ValueError, match="must be multiples of"):
        type(network)(15)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_bf16_stays_near_float32(name):
    network = awake(NETWORKS[name]()).eval()
    exact = network(image(), LEVELS)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(image(), LEVELS)
        vector = network.condition(LEVELS, None)
    assert relative(rounded, exact) < 2e-2  # bf16 has 8 bits: 4e-3 a rounding
    assert rounded.dtype == vector.dtype == torch.float32
    torch.testing.assert_close(vector, network.condition(LEVELS, None), rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_starts_near_zero(name):
    assert NETWORKS[name]()(image(), LEVELS).abs().max() < 1e-3  # the denoiser is c_skip x


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_order_of_the_memory_changes_nothing(name):
    network = awake(NETWORKS[name]()).eval()
    expected = network(image(), LEVELS)
    last = network.to(memory_format=torch.channels_last)
    got = last(image().to(memory_format=torch.channels_last), LEVELS)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["unet, wavelets", "uvit, residual"])
@torch.no_grad()
def test_the_network_is_one_graph(name):
    network, label = awake(NETWORKS[name](classes=5)).eval(), torch.tensor([1, -1])
    # The "eager" backend traces as any other does, and a break of the graph raises.
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    expected = network(image(), LEVELS, label=label)
    torch.testing.assert_close(compiled(image(), LEVELS, label=label), expected)


@pytest.mark.parametrize("name", ["unet", "uvit, residual"])
@torch.no_grad()
def test_a_position_moves_the_output_and_its_absence_is_the_whole_image(name):
    network = awake(NETWORKS[name](position_frequencies=2, frame=32)).eval()
    whole = network(image(), LEVELS)
    assert torch.equal(whole, network(image(), LEVELS, position=coordinates(16, 16, 32)))
    corner = coordinates(32, 32, 32)[:, :16, :16]
    assert relative(network(image(), LEVELS, position=corner), whole) > 1e-3
    with pytest.raises(ValueError, match="position_frequencies: 0"):
        NETWORKS[name]()(image(), LEVELS, position=corner)


@pytest.mark.parametrize("name", ["unet", "uvit"])
def test_recomputing_changes_no_gradient_and_keeps_less(name):
    """The same weights and dropout; what autograd keeps is counted, not guessed."""
    gradients, kept = [], []
    for activation_checkpointing in (False, True):
        torch.manual_seed(0)
        network = awake(
            NETWORKS[name](dropout=0.3, activation_checkpointing=activation_checkpointing)
        )
        torch.manual_seed(2)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(image(), LEVELS).square().sum()
        kept.append(sum(sizes))
        runs = Counter()
        levels = [layer for level in (*network.encoder, *network.decoder) for layer in level]
        for layer in (*levels, *network.middle):
            layer.register_forward_pre_hook(lambda module, inputs, runs=runs: runs.update([module]))
        loss.backward()
        assert len(runs) == (len(levels) + len(network.middle) if activation_checkpointing else 0)
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert kept[1] < kept[0] / 2


def test_blocks_that_do_not_fit_the_levels_are_refused():
    with pytest.raises(ValueError, match=r"each level \(got 2 and 3\)"):
        SimpleUNet(32, channel_mult=(1, 2, 2), blocks=(1, 1))
    with pytest.raises(ValueError, match=r"got 3 for 3 levels"):
        UViT(32, channel_mult=(1, 2, 2), blocks=(1, 1, 1))
