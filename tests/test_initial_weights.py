"""What networks begin with: the distributions of the papers and their released code.

EDM's DDPM++ and NCSN++ and DDPM begin Xavier-uniform (Glorot & Bengio 2010, eq. 16), within
gain sqrt(6 / (fan in + fan out)); ADM as torch's layers do, within 1 / sqrt(fan in).
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from diffusion_pl.networks.adm import ADM
from diffusion_pl.networks.ddpm_unet import DDPMUNet
from diffusion_pl.networks.simple_unet import SimpleUNet
from diffusion_pl.networks.song_layers import FourierEmbedding
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.networks.uvit import UViT

SMALL = {"model_channels": 64, "channel_mult": (1, 2), "blocks": 1, "attention": (8,)}
SIMPLE = {"model_channels": 32, "channel_mult": (1, 2), "embedding_channels": 64, "heads": 2}
# By the layer's own name, where it is not 1: what begins near zero, and queries, keys and values.
SONG = {"conv1": 1e-5, "proj": 1e-5, "out_conv": 1e-5, "qkv": math.sqrt(0.2)}
# Ho's three layers of C to C are one of C to 3 C here.
HO = {"conv1": 1e-5, "proj": 1e-5, "out_conv": 1e-5, "qkv": math.sqrt(2)}
# The head's convolution; the transformer's are the second dense layer and the projection.
WEIGHTS = {"conv1": 1e-5, "proj": 1e-5, "head.conv": 1e-5}
XAVIER = {
    "ddpm++": (partial(SongUNet, 16, classes=32, augment=32, **SMALL), SONG),
    "ncsn++": (
        partial(SongUNet, 16, encoder="residual", resample_filter=(1, 3, 3, 1), **SMALL), SONG
    ),
    "ddpm": (partial(DDPMUNet, 16, classes=32, resample="even", **SMALL), HO),
    "simple": (
        partial(SimpleUNet, 16, classes=32, blocks=(1, 1), attention=(8,), **SIMPLE), WEIGHTS
    ),
    "simple, patches": (
        partial(SimpleUNet, 32, blocks=(1, 1), halvings=2, reduction="patch", **SIMPLE), WEIGHTS
    ),
    "uvit": (
        partial(UViT, 16, blocks=(1,), transformers=1, **SIMPLE),
        WEIGHTS | {"middle.0.dense1": 1e-5},
    ),
}  # fmt: skip


def layers(network):
    for name, layer in network.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            yield name, layer


def is_uniform(values, bound):
    """Whether many numbers look drawn from U(-bound, bound)."""
    seen = values.detach() / bound
    assert seen.numel() >= 400
    # The largest of 400 is below 0.97 in 5 of a million draws; a standard error of std is 2.2 %.
    assert 0.97 < seen.abs().max() <= 1 + 1e-6
    assert seen.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.1)
    assert abs(seen.mean()) < 5 / math.sqrt(3 * seen.numel())


@pytest.mark.parametrize("name", XAVIER)
def test_weights_begin_within_glorots_bound_and_biases_at_zero(name):
    torch.manual_seed(0)
    make, gains = XAVIER[name]
    for key, layer in layers(make()):
        fans = nn.init._calculate_fan_in_and_fan_out(layer.weight)
        gain = next((gains[end] for end in gains if key.endswith(end)), 1.0)
        is_uniform(layer.weight, gain * math.sqrt(6 / sum(fans)))
        assert layer.bias is None or not layer.bias.any()


def test_adm_begins_as_torch_does_and_with_zeros():
    torch.manual_seed(0)
    zero = ("conv1", "proj", "out_conv", "map_augment")
    for key, layer in layers(ADM(16, classes=32, augment=9, **SMALL)):
        if key.endswith(zero):
            assert not layer.weight.any() and (layer.bias is None or not layer.bias.any()), key
        elif key == "map_label":  # standard normal
            n = layer.weight.numel()
            assert abs(layer.weight.mean()) < 5 / math.sqrt(n)
            assert layer.weight.std().item() == pytest.approx(1, rel=5 / math.sqrt(2 * n))
        else:
            bound = 1 / math.sqrt(layer.weight[0].numel())
            is_uniform(layer.weight, bound)
            assert 0 < layer.bias.abs().max() <= bound


def test_fourier_frequencies_spread_by_sixteen_cycles():
    """Karras 2022, Table 1's NCSN++: scale 16 (Song 2021); 20,000 draws are within 2 %."""
    torch.manual_seed(0)
    frequencies = FourierEmbedding(40_000).freqs
    assert frequencies.std().item() == pytest.approx(16, rel=0.02)
    assert abs(frequencies.mean().item()) < 0.5
