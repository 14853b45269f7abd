"""The DDPM U-Net's options: positions, the variance beside the noise, less memory in training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.ddpm_unet import DDPMUNet, attend
from diffusion_pl.networks.position import coordinates
from diffusion_pl.objectives.ddpm import DDPM

SMALL = {
    "model_channels": 8, "channel_mult": (1, 2), "blocks": 1, "attention": (4,), "groups": 4,
}  # fmt: skip


def unet(**options):
    """A network of random weights, also where it would begin at zero."""
    torch.manual_seed(0)
    network = DDPMUNet(8, **(SMALL | options))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def image(side=8):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_position_moves_the_output_and_its_absence_is_the_whole_image():
    network, levels = unet(position_frequencies=3, frame=16).eval(), torch.tensor([3.0, 700.0])
    whole = network(image(), levels)
    assert torch.equal(whole, network(image(), levels, position=coordinates(8, 8, 16)))
    corner = network(image(), levels, position=coordinates(16, 16, 16)[:, :8, :8])
    assert (corner - whole).abs().max() > 1e-3


def test_without_octaves_a_position_is_refused():
    with pytest.raises(ValueError, match="position_frequencies: 0"):
        unet()(image(), torch.zeros(2), position=coordinates(8, 8, 8))


@torch.no_grad()
def test_one_network_takes_every_resolution_of_the_frame():
    network = unet(position_frequencies=2, frame=32).eval()
    for side in (8, 16, 32):
        assert network(image(side), torch.zeros(2)).shape == (2, 3, side, side)


@torch.no_grad()
def test_the_variance_is_beside_the_image():
    denoiser = DDPM().denoiser(unet(learned_variance=True).eval())
    x, sigma = image().double(), torch.tensor(1.0, dtype=torch.float64)
    both = denoiser(x, sigma, variance=True)
    assert both.shape == (2, 6, 8, 8)
    assert torch.equal(both[:, :3], denoiser(x, sigma))
    with pytest.raises(ValueError, match="gives no variance"):
        DDPM().denoiser(unet().eval())(x, sigma, variance=True)


def test_recomputing_changes_no_gradient_and_keeps_less():
    """The same weights and dropout; what autograd keeps is counted, not guessed."""
    gradients, kept = [], []
    for activation_checkpointing in (False, True):
        network = unet(dropout=0.3, activation_checkpointing=activation_checkpointing)
        torch.manual_seed(2)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(image(), torch.tensor([3.0, 700.0])).square().sum()
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert kept[1] < kept[0] / 2


def test_a_multiplier_that_is_not_whole_gives_the_nearest_width():
    assert 100 * 0.29 < 29  # in float64, by 4e-15
    with torch.device("meta"):
        network = unet(model_channels=100, channel_mult=(1, 0.29), groups=1, attention=())
    assert network.middle[0].conv1.out_channels == 29


@pytest.mark.parametrize(
    ("heads", "head_channels"), [(5, None), (0, None), (1, 16), (1, 5), (1, 8)]
)
def test_channels_that_are_no_whole_number_of_heads_are_refused(heads, head_channels):
    norm = nn.GroupNorm(3, 12)
    with pytest.raises(UserError, match="12 channels are no whole number of attention heads"):
        attend(norm, heads, head_channels)
    assert attend(norm, 3, None).heads == 3
    assert attend(norm, 1, 4).heads == 3


@pytest.mark.parametrize(("resample", "width"), [("block", 16), ("right", 8), ("even", 8)])
def test_the_first_convolution_is_of_the_first_levels_width_in_adm_alone(resample, width):
    settings = {"channel_mult": (2, 2), "blocks": 1, "attention": (), "groups": 4}
    network = DDPMUNet(8, model_channels=8, resample=resample, **settings)
    assert network.stem.weight.shape[0] == width
