"""Values within values: references in a file and overrides of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_parts import (
    HERE,
    experiments_folder,
    line,
    write,
)

from diffusion_pl import config
from diffusion_pl.config import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return experiments_folder(tmp_path)


# References


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: ${b}\nb: 3", 3),
        ("a: ${b.c}\nb: {c: [1, 2]}", [1, 2]),
        ("a: ${b.1}\nb: [1, 2]", 2),
        ("a: at ${b} of ${c}\nb: 3\nc: x", "at 3 of x"),
        ("a: ${b}\nb: ${c}\nc: {d: '${e}'}\ne: 1", {"d": 1}),
        ("a: ${b.d}\nb: ${c}\nc: {d: 1}", 1),
        ("a: {x: '${b}'}\nb: null", {"x": None}),
    ],
)
def test_a_reference_takes_the_value_it_names(tmp_path: Path, text: str, value: object) -> None:
    write(tmp_path, "x", text)
    assert config.load("x", folder=tmp_path).tree["a"] == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: ${oc.env:HOME}", r"a: only \$\{dotted.key\} can be .*environment"),
        ("a: 'x ${oc.env:HOME,none} ${b}'\nb: 1", "a: only"),
        ("a: ${oc.${b}:HOME}\nb: env", "a: only"),
        ("a: $${b}{oc.env:HOME}\nb: ''", "a: only"),
        ("a: ${oc.decode:'1'}", "a: only"),
        ("a: ${.b}\nb: 1", "a: only"),
        ("a: \\${b}\nb: 1", "a: only"),
        ("a: ${b}{b}\nb: $", r"a: holds an interpolation \(got '\$\{b\}'\)"),
        ("a: ${data.batch}\ndata: {batch_size: 1}", "a: unknown key in .*'data.batch_size'"),
        ("a: ${b.c}\nb: 1", r"a: unknown key in \$\{b.c\}"),
        ("a: x${b}\nb: [1]", r"a: \$\{b\} is not a single value"),
        ("a: ${b}\nb: ${a}", r"refers to itself \(got b -> a -> b\)"),
        ("a: {b: '${a}'}", "refers to itself"),
        ("\n".join(f"a{i}: ${{a{i + 1}}}" for i in range(30)), "more than 8 references"),
        (
            "a0: [x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{i}: [" + f"'${{a{i - 1}}}'," * 8 + "]\n" for i in range(1, 8)),
            "references expand to more than 10000 values",
        ),
    ],
)
def test_a_bad_reference_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = write(tmp_path, "x", text)
    with pytest.raises(ConfigError, match=says) as error:
        config.load("x", folder=tmp_path)
    assert line(error).startswith(f"{file.as_posix()}: ")


def test_references_may_expand_to_ten_thousand_values_and_no_further(tmp_path: Path) -> None:
    # The whole, eleven keys, and a list of 900 eleven times: 12 + 9,900 values.
    copies = "".join(f"b{i}: ${{a}}\n" for i in range(10))
    write(tmp_path, "x", f"a: {[1] * 900}\n{copies}")
    assert len(config.load("x", folder=tmp_path).tree["b9"]) == 900
    write(tmp_path, "x", f"a: {[1] * 910}\n{copies}")
    with pytest.raises(ConfigError, match="references expand to more than 10000 values"):
        config.load("x", folder=tmp_path)


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.real=1e-4", "optimizer.real", 1e-4),
        ("optimizer.maybe=null", "optimizer.maybe", None),
        ("data.sizes=[1,2, 3]", "data.sizes", [1, 2, 3]),
        ("data.sizes.1=7", "data.sizes", [1, 7]),
        ("data.batch_size=2_000_000", "trainer.batch_size", 2_000_000),
        ("data.file=a=b", "data.file", "a=b"),
        ("data.file='1e-4'", "data.file", "1e-4"),
        ("data={workers: 3}", "data.batch_size", 1_000_000),
        ("data.share={}", "data.share", {}),
        ("name=${seed}", "name", 0),
        ("features._target_=a.b", "features", {"_target_": "a.b"}),
        ("objective._target_=a.b", "objective", {"_target_": "a.b"}),
        ("objective._target_=HERE.Objective", "objective.P_std", 1.2),
    ],
)
def test_an_override_is_parsed_as_yaml_and_set(
    folder: Path, override: str, key: str, value: object
) -> None:
    loaded = config.load("edm", [override.replace("HERE", HERE)], folder)
    assert loaded.get(key) == value
    assert type(loaded.get(key)) is type(value)


def test_a_key_of_digits_is_an_integer_as_in_a_file(tmp_path: Path) -> None:
    write(tmp_path, "x", "share: {64: 0.5}")
    loaded = config.load("x", ["share.64=0.25", "share.128=0.75"], tmp_path)
    assert loaded.tree["share"] == {64: 0.25, 128: 0.75}


def test_an_override_reaches_into_an_argument_that_no_file_gives() -> None:
    loaded = config.load("quickstart", ["trainer.dropout.label=0.1", "trainer.dropout.text=0.2"])
    assert "dropout" not in config.load("quickstart").tree["trainer"]
    assert config.build(loaded, "trainer").dropout == {"label": 0.1, "text": 0.2}
    with pytest.raises(ConfigError, match="SET: trainer.dropot: unknown .* did you mean 'dropout'"):
        config.build(config.load("quickstart", ["trainer.dropot.label=0.1"]), "trainer")


def test_the_order_of_overrides_matters_only_for_the_same_key(folder: Path) -> None:
    overrides = ["features.stop=5", "features._target_=a.b", "seed=1", "seed=2"]
    for order in (overrides, overrides[1:] + overrides[:1]):
        tree = config.load("edm", order, folder).tree
        assert tree["features"] == {"_target_": "a.b", "stop": 5}
        assert tree["seed"] == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimzer.real=1", r"optimzer.real: there is no 'optimzer' in .*'optimizer'\?"),
        ("objective.shedule.stop=1", "there is no 'objective.shedule' .*'objective.schedule'"),
        ("seed.x=1", r"seed.x: 'seed' in .*edm.yaml has no 'x' \(it is 0\)"),
        ("features.x=1", r"'features' in .* has no 'x' \(it is None\).*features._target_"),
        ("data.sizes.2=1", r"'data.sizes' in .* has no '2' \(it is \[1, 2\]\)"),
        ("seed", "seed: must be dotted.key=value .got 'seed'"),
        ("seed=", "seed: must be dotted.key=value"),
        ("=3", "must be dotted.key=value"),
        ("data..x=3", "must be dotted.key=value"),
        ("seed=[1", "seed: not valid YAML"),
        ("seed=" + "[" * 100_000, "seed: more than 5,000 keys"),
        ("seed=!!python/name:os.system x", "seed: not valid YAML"),
        ("seed=${oc.env:HOME}", "seed: only"),
        ("defaults=other", "defaults: can only be named in a file"),
    ],
)
def test_a_bad_override_is_one_line(folder: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        config.load("edm", [override], folder)
    assert line(error).startswith("SET: ")
