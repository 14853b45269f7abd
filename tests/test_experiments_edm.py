"""EDM's experiments: each letter of Karras 2022's Table 2 changes what it is said to."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_pl import config
from diffusion_pl.commands import parts
from diffusion_pl.config.tree import leaves
from diffusion_pl.objectives.edm import EDM

FOLDER = Path(__file__).parents[1] / "experiments"


def read(name):
    return config.load(name, (), FOLDER)


def named(letter, kind):
    return "cifar10_edm" if (letter, kind) == ("f", "vp") else f"cifar10_edm_{letter}_{kind}"


# Karras 2022 (measured on the released code).
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cifar10_edm_a_vp", 61_804_419),
        ("cifar10_edm_a_ve", 62_758_787),
        ("cifar10_edm_f_ve", 56_397_827),
        ("cifar10_edm_f_vp_cond", 55_735_299),
        ("ffhq64_edm", 61_805_571),
        ("afhqv2_64_edm_ve", 62_761_091),
        ("imagenet64_edm", 295_899_267),
        ("imagenet64_edm2", 280_209_253),
    ],
)
def test_networks_have_the_published_number_of_parameters(name, parameters):
    network = parts.meta_network(read(name))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_each_letter_changes_only_its_own_sections(kind):
    # B also trains otherwise; C is the network alone, D and E the objective, F the augmentation,
    # which replaces the data's mirror. VE's E is no longer bound to VE's lowest level.
    expected = {
        "b": {"data", "ema", "lr_schedule", "network", "optimizer", "trainer"},
        "c": {"network"},
        "d": {"objective"},
        "e": {"objective", "sampler"} if kind == "ve" else {"objective"},
        "f": {"augment", "data", "network"},
    }
    for before, after in zip("abcde", "bcdef", strict=True):
        old, new = (dict(leaves(read(named(letter, kind)).tree)) for letter in (before, after))
        changed = {key.split(".")[0] for key, value in new.items() if old.get(key) != value}
        changed |= {key.split(".")[0] for key in old.keys() - new.keys()}
        assert changed == expected[after], after


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_config_a_is_the_published_baseline_and_b_on_are_edms(kind):
    published = {
        "a": {"data.batch_size": 128, "optimizer.lr": 2e-4, "lr_schedule.warmup": 640_000,
              "trainer.grad_clip": 1.0, "network.dropout": 0.1},
        "b": {"data.batch_size": 512, "optimizer.lr": 1e-3, "lr_schedule.warmup": 10_000_000,
              "trainer.grad_clip": None, "network.dropout": 0.13, "ema.half_life": 500_000,
              "ema.ramp_up": 0.05},
    }  # fmt: skip
    for letter, settings in published.items():
        experiment = read(named(letter, kind))
        for key, value in settings.items():
            assert experiment.get(key) == value, key
    half_life = {"vp": 890_000, "ve": 900_000}[kind]
    assert config.build(read(named("a", kind)), "ema").half_life == half_life


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_config_d_keeps_the_noise_levels_of_c_under_edms_preconditioning(kind):
    before, after = (config.build(read(named(letter, kind)), "objective") for letter in "cd")
    assert after.schedule == before.schedule
    assert after.weight == before.weight
    assert after.preconditioning == EDM().preconditioning
    assert config.build(read(named("e", kind)), "objective") == EDM()


@pytest.mark.parametrize("kind", ["vp", "ve"])
@pytest.mark.parametrize("letter", "abcdef")
def test_class_conditional_configs_differ_by_their_classes_alone(letter, kind):
    alone = dict(leaves(read(named(letter, kind)).tree))
    conditional = dict(leaves(read(f"cifar10_edm_{letter}_{kind}_cond").tree))
    assert conditional == alone | {"network.classes": 10}


def test_the_64_pixel_runs_have_the_published_settings():
    published = {
        "ffhq64_edm": {"data.batch_size": 256, "optimizer.lr": 2e-4, "network.dropout": 0.05,
                       "augment.probability": 0.15, "sampler.steps": 40},
        "afhqv2_64_edm": {"network.dropout": 0.25, "optimizer.lr": 2e-4, "sampler.steps": 40},
        "imagenet64_edm": {"data.batch_size": 4096, "optimizer.lr": 1e-4, "sampler.steps": 256,
                           "ema.half_life": 50_000_000, "sampler.integrate.S_churn": 40.0,
                           "sampler.integrate.S_tmin": 0.05, "sampler.integrate.S_tmax": 50.0,
                           "sampler.integrate.S_noise": 1.003, "network.dropout": 0.1},
        # Karras 2024, Table 6, and the released preset edm2-img64-s.
        "imagenet64_edm2": {"data.batch_size": 2048, "optimizer.lr": 1e-2, "network.dropout": 0.0,
                            "optimizer.betas": [0.9, 0.99], "trainer.total_images": 1024 << 20,
                            "lr_schedule.decay_from": 35_000 * 2048,
                            "lr_schedule.warmup": 10_000_000,
                            "objective.P_mean": -0.8, "objective.P_std": 1.6, "sampler.steps": 32},
    }  # fmt: skip
    for name, settings in published.items():
        experiment = read(name)
        for key, value in settings.items():
            assert experiment.get(key) == value, (name, key)
