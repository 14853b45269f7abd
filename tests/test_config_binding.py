"""Every node is held against its callable's signature, and each misfit is one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from config_parts import (
    HERE,
    LINEAR,
    Plain,
    checked,
    experiments_folder,
    line,
    typed,
    write,
)

from diffusion_pl import config
from diffusion_pl.config import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return experiments_folder(tmp_path)


def test_a_good_experiment_binds(folder: Path) -> None:
    config.check(
        config.load("edm", ["optimizer.either=x"], folder),
        known=["seed", "data", "features", "objective", "optimizer", "lr_schedule", "trainer"],
    )


def test_a_misspelt_argument_names_file_key_callable_and_nearest(folder: Path) -> None:
    file = write(folder, "typo", "defaults: edm\nobjective: {P_sdt: 1.2}")
    with pytest.raises(ConfigError) as error:
        config.check(config.load("typo", folder=folder))
    assert line(error) == (
        f"{file.as_posix()}: objective.P_sdt: unknown argument of {HERE}.Objective; "
        "did you mean 'P_std'?"
    )


def test_an_override_of_a_key_in_no_file_is_bound_too(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^SET: optimizer\.reel: unknown .*'real'"):
        config.check(config.load("edm", ["optimizer.reel=1"], folder))


def test_all_problems_are_reported_in_order_a_line_each(folder: Path) -> None:
    text = """
        sampler:
          - _target_: HERE.Liner
          - inner: {_target_: HERE.Linear, stop: high, start: .nan}
        objective: {_target_: HERE.Objective, schedule: {_target_: HERE.Linear, stp: 1}}
        """
    loaded = config.load(write(folder, "bad", text))
    with pytest.raises(ConfigError) as error:
        config.check(loaded)
    assert [each.partition(": ")[2] for each in str(error.value).split("\n")] == [
        f"sampler.0._target_: {HERE} has no 'Liner'; did you mean 'Linear'?",
        f"sampler.1.inner.stop: must be float for {HERE}.Linear (got 'high')",
        "sampler.1.inner.start: must be finite (got nan); write a number, or null where allowed",
        f"objective.P_std: missing argument of {HERE}.Objective; add it",
        f"objective.schedule.stp: unknown argument of {HERE}.Linear; did you mean 'stop'?",
    ]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere_at_all.x", "there is no module 'nowhere_at_all'"),
        ("diffusion_pl.confg.load", "diffusion_pl has no module 'confg'; did you mean 'config'"),
        ("diffusion_pl.config.laod", "diffusion_pl.config has no 'laod'; did you mean 'load'"),
        # Of `dataclass`, which that module imports, no part can be made.
        ("diffusion_pl.data.shards.datacass", "shards has no 'datacass'; known: "),
        ("HERE.Linear.mak", "Linear has no 'mak'"),
        ("json", "must be the dotted path"),
        ("json..dumps", "must be the dotted path"),
        (3, "must be the dotted path of a class or function (got 3)"),
        (None, "must be the dotted path of a class or function (got None)"),
        ("math.pi", "math.pi is not a class or function (it is a float)"),
        ("os.path", "os.path is not a class or function (it is a module)"),
        ("broken_module.x", "broken_module cannot be imported (ZeroDivisionError: division by"),
        ("needy_module.x", "needy_module cannot be imported (ModuleNotFoundError: No module"),
    ],
)
def test_a_target_that_is_not_there_says_what_is(
    target: object, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("1 / 0")
    (tmp_path / "needy_module.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    value = target.replace("HERE", HERE) if isinstance(target, str) else target
    lines = checked({"node": {"_target_": value, "child": {"_target_": f"{HERE}.Plain", "x": 1}}})
    assert len(lines) == 2, "what stands below a bad target is checked as well"
    assert lines[0].startswith("node._target_: ")
    assert says in lines[0]
    assert lines[1].startswith("node.child.x: unknown argument")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("integer", [0, -3], [1.0, True, "1", None, [1]]),
        ("real", [0, 1e-4], [True, "1e-4", None]),
        ("text", ["", "1"], [1, None, True]),
        ("flag", [True, False], [0, "true", None]),
        ("maybe", [None, 3], ["3", 1.0, False]),
        ("choice", ["large", 1], ["lrage", 3, None, True]),
        ("pair", [[0, 1.5]], [[1], [1, 2, 3], ["a", 1], 3, {"a": 1}]),
        ("sizes", [[], [1, 2, 3]], [[1.0], [True], 3, "12"]),
        ("names", [["a"], []], ["a", [1]]),
        ("steps", [None, [1]], [["a"], 1]),
        ("share", [{}, {64: 1, 256: 0.5}], [{"a": 1}, {64: "x"}, [1]]),
        ("folder", ["data/cifar10"], [3, None]),
        ("call", [LINEAR, {"_target_": f"{HERE}.make_linear", "_partial_": True}], ["abs", 3]),
        ("call", [], [{"_target_": f"{HERE}.collect"}, {"_target_": f"{HERE}.Plain"}]),
        ("call", [], [{"_target_": f"{HERE}.make_plain"}, {"_target_": f"{HERE}.make_nothing"}]),
        ("schedule", [LINEAR, None], ["linear", 3, {"stop": 2}, [LINEAR]]),
        ("linear", [LINEAR, {"_target_": f"{HERE}.make_linear", "stop": 3}], ["linear"]),
        ("linear", [], [{"_target_": f"{HERE}.Plain"}, {"_target_": f"{HERE}.make_plain"}]),
        ("linear", [], [{**LINEAR, "_partial_": True}]),
        ("size", [{"_target_": f"{HERE}.Named", "width": 1}], [{"_target_": "builtins.tuple"}]),
        ("either", [1, "a"], [None, 1.5]),
        ("unknown", [1, "a", None, LINEAR], []),
        ("integer", [], [LINEAR]),
        ("choice", [], [LINEAR]),
    ],
)
def test_values_are_held_against_their_annotation(name: str, good: list, bad: list) -> None:
    for value in good:
        assert typed(name, value) == []
    for value in bad:
        lines = typed(name, value)
        assert len(lines) == 1
        assert lines[0].startswith(f"node.{name}: must be ")
        assert f" for {HERE}.Typed (got " in lines[0]


def test_what_is_wanted_and_what_was_got_are_in_the_line() -> None:
    assert typed("choice", "lrage") == [
        f"node.choice: must be one of 'small', 'large', 1 for {HERE}.Typed (got 'lrage')"
    ]
    wanted = f"must be a node with _target_ that makes {HERE}.Schedule for {HERE}.sampled"
    assert checked({"node": {"_target_": f"{HERE}.sampled", "schedule": 3}}) == [
        f"node.schedule: {wanted} (got 3)"
    ]
    assert typed("linear", {"_target_": f"{HERE}.Plain"})[0].endswith(
        f"(got a node of {HERE}.Plain)"
    )


def test_null_is_written_as_yaml_does() -> None:
    assert typed("maybe", "3") == [f"node.maybe: must be int or null for {HERE}.Typed (got '3')"]


def test_a_plain_class_is_held_against_its_constructor() -> None:
    node = {"_target_": f"{HERE}.Scaled", "width": 3, "scale": 2}
    assert checked({"node": node}) == []
    assert checked({"node": {**node, "width": "3"}}) == [
        f"node.width: must be int for {HERE}.Scaled (got '3')"
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite_wherever_they_stand(value: float) -> None:
    for tree in ({"a": value}, {"a": {"b": [value]}}, {"a": {**LINEAR, "stop": value}}):
        lines = checked(tree)
        assert len(lines) == 1
        assert "must be finite" in lines[0]


def test_a_partial_node_may_leave_arguments_open_but_not_misspell_them() -> None:
    node = {"_target_": f"{HERE}.step", "_partial_": True}
    assert checked({"node": node}) == []
    assert len(checked({"node": {**node, "sise": 1}})) == 1
    assert len(checked({"node": {**node, "size": "a"}})) == 1
    assert len(checked({"node": {**node, "_partial_": False}})) == 3


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"_traget_": "a.b"}, "node._traget_: unknown special key; did you mean '_target_'?"),
        ({**LINEAR, "_args_": [1]}, "node._args_: unknown special key"),
        ({**LINEAR, "_partial_": 1}, "node._partial_: must be true or false (got 1)"),
        ({"_partial_": True}, "node._partial_: stands without _target_"),
    ],
)
def test_keys_of_our_own_are_checked(node: dict, says: str) -> None:
    lines = checked({"node": node})
    assert len(lines) == 1
    assert lines[0].startswith(says)


def test_what_the_program_hands_in_counts_as_given() -> None:
    tree = {"node": {"_target_": f"{HERE}.step", "size": 1.0}}
    assert len(checked(tree)) == 2
    assert checked(tree, given={"node": ["x", "noise"]}) == []
    assert checked(tree, given={"node": ["x", "noise", "size"]}) == [
        f"node.size: is handed to {HERE}.step by the program; remove it"
    ]
    assert checked(tree, given={"node": ["x", "noise", "device"]}) == [
        f"node: {HERE}.step takes no 'device', which the program hands in; use another target"
    ]
    assert checked({"node": {"_target_": f"{HERE}.collect"}}, given={"node": ["x"]}) == []


def test_sections_are_known_required_and_typed() -> None:
    tree = {"netwrok": LINEAR, "seed": "a", "data": None}
    assert checked(tree, known=["network", "seed", "data"], required=["data", "seed", "ema"]) == [
        "netwrok: unknown section; did you mean 'network'?",
        "data: missing section (got null); add it",
        "ema: missing section; add it",
    ]
    known = {"netwrok": Plain, "seed": int, "data": Any}
    assert checked(tree, known=known) == [
        f"netwrok: must be a node with _target_ that makes {HERE}.Plain "
        f"(got a node of {HERE}.Linear)",
        "seed: must be int (got 'a')",
    ]


def test_only_the_sections_asked_for_are_bound() -> None:
    tree = {"a": {"_target_": "nowhere.x"}, "b": LINEAR}
    assert checked(tree, sections=["b"]) == []
    assert len(checked(tree, sections=["a"])) == 1


def test_annotations_of_torch_optimizers_are_understood() -> None:
    node = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3, "betas": [0.9, 0.99]}
    assert checked({"node": node}) == []
    assert len(checked({"node": {**node, "lr": "1e-3", "betas": [0.9], "fused": 1}})) == 3


def test_a_callable_without_signature_is_left_to_the_call() -> None:
    assert checked({"node": {"_target_": "builtins.dict", "anything": 1}}) == []
