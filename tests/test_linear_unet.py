"""LinearUNet's promises; test_import_lucidrains.py holds its outputs to the package's."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch

from diffusion_pl.networks.linear_unet import Attention, Block, LinearUNet

SMALL = partial(
    LinearUNet, 16, model_channels=8, channel_mult=(1, 2, 2), heads=2, head_channels=4, memories=2
)
LEVELS = torch.tensor([3.0, 700.0])


def image():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_the_innermost_level_and_the_middle_attend_in_full_unless_said_otherwise():
    def full(network):
        levels = (*network.encoder, *network.decoder)
        return [not level.attention.linear for level in levels]

    assert full(SMALL()) == [False, False, True, True, False, False]
    assert full(SMALL(full=(True, False, False))) == [True, False, False, False, False, True]
    assert not SMALL(full=(False, False, False)).middle[1].linear
    assert sum(isinstance(module, Attention) for module in SMALL().modules()) == 7


def test_labels_and_sides_that_are_not_halved_are_refused():
    with pytest.raises(ValueError, match=r"classes must be 0 \(got 3\)"):
        SMALL(classes=3)
    with pytest.raises(ValueError, match=r"multiples of 4 \(got 16 x 18\)"):
        SMALL()(torch.zeros(1, 3, 16, 18), torch.zeros(1))
    with pytest.raises(ValueError, match="multiples of 4"):
        LinearUNet(18, channel_mult=(1, 2, 2))


def test_dropout_acts_in_training_only_and_in_every_block():
    network = SMALL(dropout=0.5)
    assert {b.drop.p for b in network.modules() if isinstance(b, Block)} == {0.5}
    network.eval()
    assert torch.equal(network(image(), LEVELS), network(image(), LEVELS))
    network.train()
    assert not torch.equal(network(image(), LEVELS), network(image(), LEVELS))


@torch.no_grad()
def test_the_embedding_is_not_rounded():
    network = SMALL()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network.embed(LEVELS)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, network.embed(LEVELS), rtol=0, atol=0)


def test_recomputing_changes_no_gradient_and_runs_every_block_twice():
    gradients = []
    for activation_checkpointing in (False, True):
        torch.manual_seed(0)
        network, runs = (
            SMALL(dropout=0.3, activation_checkpointing=activation_checkpointing),
            Counter(),
        )
        for module in network.modules():
            if isinstance(module, Block):
                module.register_forward_pre_hook(lambda block, _, runs=runs: runs.update([block]))
        torch.manual_seed(2)
        network(image(), LEVELS).square().sum().backward()
        assert set(runs.values()) == {1 + activation_checkpointing}
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
