"""Objects receive objects, and a configuration read back builds only what is trusted."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from config_parts import (
    HERE,
    LINEAR,
    Linear,
    Named,
    Objective,
    Plain,
    Typed,
    checked,
    experiments_folder,
    line,
    write,
)

from diffusion_pl import config
from diffusion_pl.config import Config, ConfigError
from diffusion_pl.diffusion.schedules import Rho


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return experiments_folder(tmp_path)


# Building


def test_objects_receive_objects(folder: Path) -> None:
    loaded = config.load("edm", ["objective.schedule.stop=5"], folder)
    built = config.build(loaded, "objective")
    assert built == Objective(schedule=Linear(stop=5.0), P_std=1.2)
    assert type(built.schedule.stop) is float
    assert config.build(loaded, "objective.schedule") == Linear(stop=5.0)
    assert config.build(loaded, "data") == {"batch_size": 1_000_000, "sizes": [1, 2]}
    assert config.build(loaded, "features") is None


def test_values_take_the_annotated_type() -> None:
    node = {
        "_target_": f"{HERE}.Typed",
        "real": 2,
        "pair": [0, 1],
        "sizes": [1, 2],
        "names": ["a"],
        "steps": [1],
        "share": {64: 1},
        "folder": "data",
        "either": 3,
        "unknown": [LINEAR],
    }
    built = config.build(Config("x", "x.yaml", {"node": node}), "node")
    assert built == Typed(
        real=2.0,
        pair=(0.0, 1.0),
        sizes=(1, 2),
        names=["a"],
        steps=[1],
        share={64: 1.0},
        folder=Path("data"),
        either=3,
        unknown=[Linear()],
    )
    floats = (built.real, *built.pair, built.share[64])
    assert all(type(each) is float for each in floats)
    assert type(built.either) is int


@pytest.mark.parametrize("scale", [2, 2.0])
def test_of_several_types_a_value_keeps_its_own(scale: float) -> None:
    node = {"_target_": f"{HERE}.Scaled", "width": 3, "scale": scale}
    assert type(config.build(Config("x", "x.yaml", {"node": node}), "node").scale) is type(scale)


def test_a_named_tuple_is_built_and_bound() -> None:
    tree = {"good": {"_target_": f"{HERE}.Named", "width": 3}, "bad": {"_target_": f"{HERE}.Named"}}
    assert config.build(Config("x", "x.yaml", tree), "good") == Named(width=3)
    assert len(checked(tree)) == 1


def test_nodes_in_lists_and_mappings_are_built() -> None:
    tree = {"evaluation": {"metrics": [LINEAR, {**LINEAR, "stop": 4}], "by": {"a": LINEAR}, "n": 1}}
    loaded = Config("x", "x.yaml", tree)
    assert config.build(loaded, "evaluation") == {
        "metrics": [Linear(), Linear(stop=4.0)],
        "by": {"a": Linear()},
        "n": 1,
    }
    assert config.build(loaded, "evaluation.metrics.1") == Linear(stop=4.0)
    assert tree["evaluation"]["metrics"][0] == LINEAR, "the config is left as it was"


def test_partial_and_extra_reach_the_callable() -> None:
    node = {"_target_": f"{HERE}.step", "size": 2}
    loaded = Config("x", "x.yaml", {"a": {**node, "_partial_": True}, "b": node})
    partial = config.build(loaded, "a", noise=abs)
    assert isinstance(partial, functools.partial)
    assert partial(-1.0) == 1.0
    assert config.build(loaded, "b", x=3.0, noise=abs) == 9.0
    with pytest.raises(ConfigError, match=r"x\.yaml: b\.noise: missing argument"):
        config.build(loaded, "b", x=3.0)


def test_a_constructors_own_refusal_has_file_and_key_in_front(folder: Path) -> None:
    file = write(folder, "low", "defaults: edm\nobjective: {schedule: {stop: 0}}")
    loaded = config.load(file)
    config.check(loaded)
    with pytest.raises(ConfigError) as error:
        config.build(loaded, "objective")
    assert line(error) == (
        f"{(folder / 'edm.yaml').as_posix()} + {file.as_posix()}: objective.schedule: "
        "stop must exceed start (got 0.0)"
    )


def test_a_section_that_is_not_there_names_the_nearest(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"edm\.yaml: objectiv: missing; did you mean 'objective'"
    ):
        config.build(config.load("edm", folder=folder), "objectiv")


# Trust


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.hub.load",
        "torch.optimal.x",
        "torch.optim._adafactor.Adafactor",
        "diffusion_pl_evil.x",
        "diffusion_pl._private.x",
        "diffusion_pl.config.Config.__init__",
        ["os.system"],
        None,
    ],
)
def test_a_config_read_back_may_not_name_other_packages(target: object) -> None:
    tree = {"network": {"_target_": f"{HERE}.Linear", "list": [{"a": {"_target_": target}}]}}
    with pytest.raises(ConfigError, match=r"^run/config\.yaml: network\.list\.0\.a\._target_"):
        config.check(config.load_resolved(tree, "run/config.yaml", allow=[HERE]))
    with pytest.raises(ConfigError):
        config.build(Config("x", "x", tree, packages=(HERE,)), "network.list.0.a")


@pytest.mark.parametrize(
    "target",
    [
        "diffusion_pl.config.reading.OmegaConf.create",
        "diffusion_pl.config.targets.importlib.import_module",
        "diffusion_pl.samplers.pyramid.Sampler",  # a part, by another module's name for it
        "diffusion_pl.objectives.edm.EDM.__call__",
    ],
)
def test_a_trusted_name_is_no_way_to_anything_else(target: str) -> None:
    with pytest.raises(ConfigError, match=r"^last\.ckpt: a\._target_: is outside diffusion_pl"):
        config.load_resolved({"a": {"_target_": target}}, "last.ckpt")
    with pytest.raises(ConfigError, match="is outside diffusion_pl's parts"):
        config.build(Config("x", "x", {"a": {"_target_": target}}, packages=()), "a")


def test_an_allowed_package_is_no_way_into_another() -> None:
    for name in ("dataclasses.replace", "Path.home", "pytest.main"):
        loaded = config.load_resolved({"a": {"_target_": f"{HERE}.{name}"}}, "x", allow=[HERE])
        with pytest.raises(ConfigError, match=r"^x: a\._target_: .* is defined in "):
            config.build(loaded, "a")


@pytest.mark.parametrize(
    "name",
    ["adam.cast", "Optimizer", "adam.Optimizer", "lr_scheduler.LambdaLR", "swa_utils.update_bn"],
)
def test_of_torchs_optimizers_only_optimizers_are_built(name: str) -> None:
    tree = {"optimizer": {"_target_": f"torch.optim.{name}", "_partial_": True}}
    loaded = config.load_resolved(tree, "last.ckpt")
    with pytest.raises(ConfigError, match=r"^last\.ckpt: optimizer\._target_: .* is no optimizer"):
        config.check(loaded)
    with pytest.raises(ConfigError, match="is no optimizer"):
        config.build(loaded, "optimizer")


def test_what_is_trusted_binds_and_builds() -> None:
    tree = {
        "optimizer": {"_target_": "torch.optim.Adafactor", "_partial_": True},
        "schedule": {"_target_": "diffusion_pl.diffusion.schedules.Rho", "rho": 5},
        "own": LINEAR,
    }
    loaded = config.load_resolved(tree, "run/config.yaml", allow=[HERE], overrides=["own.stop=3"])
    config.check(loaded)
    assert config.build(loaded, "schedule") == Rho(rho=5.0)
    assert config.build(loaded, "own") == Linear(stop=3.0)
    assert "stop" not in LINEAR
    with pytest.raises(ConfigError, match=rf"{HERE}.Linear'\); allow its top-level package"):
        config.load_resolved(tree, "run/config.yaml")


def test_an_override_is_the_users_own_and_may_name_anything() -> None:
    tree = {"a": {"_target_": "nowhere.Thing", "x": 1}, "b": {"_target_": "os.system"}}
    words = [f"a={{_target_: {HERE}.Linear, stop: 3}}", f"b._target_={HERE}.Plain"]
    loaded = config.load_resolved(tree, "last.ckpt", overrides=words)
    assert config.build(loaded, "a") == Linear(stop=3.0)
    assert type(config.build(loaded, "b")) is Plain


def test_an_override_starts_nothing_of_pythons_own_library() -> None:
    tree = {"a": {"_target_": "torch.optim.Adam", "_partial_": True}}
    for name in ("os.system", "subprocess.run", "builtins.eval", "shutil.rmtree"):
        with pytest.raises(ConfigError, match=r"^SET: a\._target_: is outside the trusted"):
            config.load_resolved(tree, "last.ckpt", overrides=[f"a._target_={name}"])


def test_an_override_lends_no_trust_to_what_others_wrote() -> None:
    tree = {"a": {"b": 1}, "c": {"d": "os.system"}}
    for words in (["a._target_=${c.d}"], ["a.b={_target_: '${c.d}'}"]):
        with pytest.raises(ConfigError, match=r"_target_: is outside .* 'os\.system'"):
            config.load_resolved(tree, "last.ckpt", overrides=words)


@pytest.mark.parametrize("name", ["diffusion_pl", "diffusion_pl.cli", "diffusion_pl.cli.main"])
def test_this_package_cannot_be_allowed_as_a_whole(name: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"^--allow: .*got '{name}'"):
        config.load_resolved({"a": 1}, "last.ckpt", allow=[name])
    with pytest.raises(ValueError, match=rf"^--allow: .*got '{name}'"):
        config.load("edm", folder=folder, allow=[name])


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({}, "is empty"),
        ([1], "must be a mapping"),
        ({"a": "${oc.env:HOME}"}, "a: holds an interpolation"),
        ({"a": {"b": object()}}, "a.b: must be a number"),
        ({"a": {None: 1}}, "a.None: a key must be a word"),
        ({"a": [0] * 10_000}, "more than 10000 values"),
    ],
)
def test_a_config_read_back_is_plain(tree: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        config.load_resolved(tree, "last.ckpt")
    assert line(error).startswith("last.ckpt: ")


def test_a_tree_that_holds_itself_is_refused() -> None:
    tree: dict[str, Any] = {"a": {}}
    tree["a"]["b"] = tree
    with pytest.raises(ConfigError, match="nested more than 32 deep"):
        config.load_resolved(tree, "last.ckpt")
