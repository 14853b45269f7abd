"""A model spread over processes: what each holds, its step, its part of a file, its drawing."""

from __future__ import annotations

import pytest
import spread
import torch
from test_cli import ROOT

from diffusion_pl import config
from diffusion_pl.commands import check
from diffusion_pl.diffusion.uncertainty import LearnedUncertainty
from diffusion_pl.networks.uvit import UViT
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.training import sharding
from diffusion_pl.training.settings import TrainerConfig
from diffusion_pl.training.strategy import Sharded, make_strategy

RANKS = 4  # more than the rows of some tensors


@pytest.fixture(scope="module")
def told():
    return spread.found(RANKS)


def test_a_rank_holds_its_part_of_weights_and_averages(told):
    for kind in ("trained", "average"):
        assert sum(rank[kind] for rank in told) == told[0]["whole"]  # nothing twice
        for rank in told:
            assert rank[kind] == pytest.approx(told[0]["whole"] / RANKS, rel=0.1)
    # And keeps no more alive, but for what FSDP pads.
    assert max(rank["bytes"] for rank in told) < 1.1 * 2 * 4 * told[0]["whole"] / RANKS
    assert any(rank["empty"] for rank in told)
    assert told[0]["units"] == 1 + len(sharding.units(spread.network()))


def test_a_rank_has_the_gradient_the_norm_and_the_step_of_one_process(told):
    for rank in told:
        assert not rank["exchanged early"]
        assert rank["norm"] < 1e-5 and rank["plain norm"]
        assert rank["gradient"] < 1e-3  # of numbers up to 100
        assert max(rank["weights"], rank["averaged"]) < 1e-5


def test_a_rank_saves_nothing_unless_it_is_the_first_and_takes_its_part_back(told):
    assert all(told[0]["saved"]) and told[0]["kind"] == "OrderedDict"
    assert all(rank["saved"] == (0, 0) for rank in told[1:])
    assert all(rank["moments"] and rank["laid out"] for rank in told)


def test_a_rank_draws_alone_from_the_whole_average_and_lets_it_go(told):
    assert told[0]["drawn"] < 1e-4
    assert all(rank["assembled"] and rank["let go"] for rank in told)


def test_every_block_of_a_network_is_a_unit():
    with torch.device("meta"):
        network = UViT(128, classes=1000)
    units = sharding.units(network)
    held = [sum(p.numel() for p in unit.parameters()) for unit in units]
    assert len(units) == 36 + 2 * 9 + 2 * 3  # transformers, residual blocks, ways down and up
    # What is gathered at once is a small share of the whole.
    whole = sum(p.numel() for p in network.parameters())
    assert max(held) < whole / 30
    assert whole - sum(held) < whole / 100


def test_fp16_and_weights_of_an_objective_are_refused_in_a_line():
    with pytest.raises(ValueError, match="fp16 does not go with strategy: fsdp"):
        TrainerConfig(total_images=8, checkpoint_every=8, strategy="fsdp", precision="fp16")
    settings = TrainerConfig(total_images=8, checkpoint_every=8, strategy="fsdp")
    settings.check_objective(EDM())
    with pytest.raises(ValueError, match="LearnedUncertainty has weights of its own; use ddp"):
        settings.check_objective(LearnedUncertainty(EDM()))


def test_ranks_are_spread_only_if_so_set_and_one_alone_never():
    def made(strategy, devices):
        settings = TrainerConfig(total_images=8, checkpoint_every=8, accelerator="cpu",
                            strategy=strategy, devices=devices)  # fmt: skip
        return make_strategy(settings)

    assert isinstance(made("fsdp", 2), Sharded)
    assert not isinstance(made("ddp", 2), Sharded)
    assert made("fsdp", 1) == "auto"


@pytest.mark.parametrize(
    ("strategy", "devices", "said"),
    [
        ("fsdp", 4, "fsdp: each of 4 devices holds 1/4 of weights, moments and averages"),
        ("ddp", 4, "ddp: each of 4 devices holds the whole model"),
        ("fsdp", 1, "fsdp: one device here, which holds the whole model"),
        ("ddp", 1, ""),
    ],
)
def test_check_says_what_a_device_holds(strategy, devices, said):
    words = [f"trainer.strategy={strategy}", f"trainer.devices={devices}"]
    experiment = config.load("quickstart", words, ROOT / "experiments")
    assert check._strategy(experiment, EDM()) == said


def test_check_refuses_what_the_run_would():
    experiment = config.load("quickstart", ["trainer.strategy=fsdp"], ROOT / "experiments")
    with pytest.raises(config.ConfigError, match="LearnedUncertainty has weights of its own"):
        check._strategy(experiment, LearnedUncertainty(EDM()))
