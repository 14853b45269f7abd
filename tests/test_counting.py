"""A network has no more tensors than a checkpoint holds, or is not made."""

from __future__ import annotations

import pytest
from torch import nn

from diffusion_pl.networks.counting import at_most, spare


def two_layers():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))  # three tensors


def test_as_many_as_are_there_may_be_made_and_no_more():
    with at_most(3):
        two_layers()
    with pytest.raises(ValueError, match=r"more than the 2 tensors"), at_most(2):
        two_layers()
    with pytest.raises(ValueError, match=r"more than the 0 tensors"), at_most(0):
        two_layers()
    with at_most(None):
        two_layers()


def test_counting_ends_with_the_block_though_it_failed():
    with pytest.raises(ValueError, match="more than"), at_most(0):
        two_layers()
    two_layers()


def test_a_network_a_little_too_large_is_still_made_to_be_named_by_its_weights():
    assert spare(10) >= 40
    assert spare(1) >= 100


def test_an_absent_weight_is_not_counted():
    with at_most(1):
        nn.Linear(2, 2, bias=False)  # registers its bias as None
