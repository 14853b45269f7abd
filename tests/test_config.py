"""Experiments in YAML: what is read and refused, and what of it travels with a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from config_parts import (
    HERE,
    experiments_folder,
    line,
    write,
)
from omegaconf import OmegaConf

from diffusion_pl import config
from diffusion_pl.config import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return experiments_folder(tmp_path)


def test_experiments_are_listed_with_their_published_number(folder: Path) -> None:
    write(folder, "bare", "seed: 1")
    assert config.experiments(folder) == {
        "bare": "",
        "edm": "FID 1.79 at 35 evaluations (Karras 2022, Table 2)",
    }


def test_a_missing_folder_of_experiments_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        config.experiments(tmp_path / "nowhere")


def test_an_experiment_lies_over_its_base(folder: Path) -> None:
    loaded = config.load("edm", folder=folder)
    assert loaded.name == "edm"
    assert loaded.file == (folder / "edm.yaml").as_posix()
    assert loaded.tree["optimizer"] == {"_target_": f"{HERE}.Typed", "real": 2e-3, "integer": 4}
    assert loaded.tree["trainer"] == {"batch_size": 1_000_000}
    assert "defaults" not in loaded.tree
    assert config.load(folder / "edm.yaml") == loaded


def test_every_key_knows_the_file_that_set_it(folder: Path) -> None:
    loaded = config.load("edm", ["optimizer.integer=5"], folder)
    base, own = (folder / "base.yaml").as_posix(), (folder / "edm.yaml").as_posix()
    assert loaded.origin("data.batch_size") == base
    assert loaded.origin("optimizer.real") == own
    assert loaded.origin("objective.schedule.start") == own
    assert loaded.origin("optimizer.integer") == "SET"
    assert loaded.origin("nowhere") == own
    write(folder, "mid", "defaults: edm\nobjective: {P_mean: 0}")
    top = write(folder, "top", "defaults: mid\nobjective: {_target_: HERE.Plain}")
    assert config.load("mid", folder=folder).origin("objective.P_mean").endswith("mid.yaml")
    assert config.load("top", folder=folder).origin("objective.P_mean") == top.as_posix()


def test_another_target_replaces_the_node_and_the_same_target_merges(folder: Path) -> None:
    write(folder, "other", "defaults: edm\nobjective: {_target_: HERE.Plain}")
    write(folder, "same", "defaults: edm\nobjective: {_target_: HERE.Objective, P_mean: 0}")
    write(folder, "into", "defaults: edm\ndata: {_target_: HERE.collect}\nseed: null")
    assert config.load("other", folder=folder).tree["objective"] == {"_target_": f"{HERE}.Plain"}
    assert set(config.load("same", folder=folder).tree["objective"]) == {
        "_target_",
        "P_std",
        "P_mean",
        "schedule",
    }
    into = config.load("into", folder=folder).tree
    assert into["data"]["sizes"] == [1, 2]
    assert into["seed"] is None


def test_a_table_by_numbers_replaces_the_one_below(tmp_path: Path) -> None:
    write(tmp_path, "base", "shares: {16: 1, 32: 2}\nnamed: {a: 1, b: 2}")
    write(tmp_path, "own", "defaults: base\nshares: {64: 3}\nnamed: {b: 3}")
    own = config.load("own", folder=tmp_path).tree
    assert own == {"shares": {64: 3}, "named": {"a": 1, "b": 3}}
    given = config.load("base", ["shares={8: 1}", "named={b: 4}"], folder=tmp_path).tree
    assert given == {"shares": {8: 1}, "named": {"a": 1, "b": 4}}
    assert config.load("base", ["shares.16=5"], folder=tmp_path).tree["shares"] == {16: 5, 32: 2}


def test_defaults_may_be_several_and_a_shared_base_does_not_undo_the_first(tmp_path: Path) -> None:
    write(tmp_path, "base", "a: 0\nb: 0\nc: 0")
    write(tmp_path, "one", "defaults: base\na: 1\nc: 1")
    write(tmp_path, "two", "defaults: base\nb: 2\nc: 2")
    write(tmp_path, "both", "defaults: [one, two]")
    assert config.load("both", folder=tmp_path).tree == {"a": 1, "b": 2, "c": 2}


def test_an_unknown_experiment_lists_the_nearest(folder: Path) -> None:
    write(folder, "edm2", "seed: 1")
    with pytest.raises(ConfigError) as error:
        config.load("edm1", folder=folder)
    assert "edm1.yaml: no such experiment (got 'edm1'); did you mean 'edm' or 'edm2'?" in line(
        error
    )
    with pytest.raises(ConfigError, match=r"nowhere/x\.yaml: no such file"):
        config.load("nowhere/x.yaml", folder=folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("defaults: bsae", "defaults: must name YAML files .*got 'bsae'.*did you mean 'base'"),
        ("defaults: 3", "defaults: must name YAML files .*got 3"),
        ("defaults: ../bad", "defaults: must name YAML files"),
        ("defaults: bad", "defaults: 'bad' has this file among its own defaults"),
        ("defaults: loop", "defaults: 'bad' has this file among its own defaults"),
        ("", "is empty"),
        ("# only a comment", "is empty"),
        ("- 1\n- 2", r"must be a mapping of sections \(got a list\)"),
        ("hello", r"must be a mapping of sections \(got 'hello'\)"),
        ("3", r"must be a mapping of sections \(got 3\)|not valid YAML"),
        ("a: [1", "not valid YAML .*line 1"),
        ("a: 1\nb: 2\na: 3", "not valid YAML .*duplicate key a at line 3"),
        ("a: 1\n---\nb: 1", "not valid YAML"),
        ("a: !!python/object/apply:os.system [exit]", "not valid YAML .*constructor for the tag"),
        ("a: !!binary aGVsbG8=", r"a: must be a number, text.*got bytes"),
        ("a: *nowhere", "not valid YAML .*undefined alias"),
        ("a: &a [*a]", "not valid YAML .*recursive aliases"),
        ("a: 'x${'", "not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("a.b: 1", "a.b: a key must be a word without dots"),
        ("a: {1.5: 2}", "a.1.5: a key must be a word"),
        ("a: {true: 2}", "a.True: a key must be a word"),
        ("a: ???", r"a: has no value \(got '\?\?\?'\); set it"),
        ("a: " + "[" * 40 + "]" * 40, "a.*: nested more than 32 deep"),
        ("a: " + "[" * 900 + "]" * 900, "nested too deeply"),
        ("a: " + "[" * 100_000 + "]" * 100_000, "more than 5,000 keys and brackets"),
        ("a:\n  " + "- " * 100_000, "more than 5,000 keys and brackets"),
        ("a: " + "x" * 1_000_001, "larger than 1,000,000 bytes"),
        (
            "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
            "not valid YAML .*expansion exceeds",
        ),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(folder: Path, text: str, says: str) -> None:
    write(folder, "loop", "defaults: bad")
    file = write(folder, "bad", text)
    with pytest.raises(ConfigError, match=says) as error:
        config.load("bad", folder=folder)
    named = folder / "loop.yaml" if text == "defaults: loop" else file
    assert line(error).startswith(f"{named.as_posix()}: ")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("# FID 2\na: 1", encoding="utf-8-sig")
    assert config.load("x", folder=tmp_path).tree == {"a": 1}
    assert config.experiments(tmp_path) == {"x": "FID 2"}


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=r"bad\.yaml: is not UTF-8 text"):
        config.load("bad", folder=tmp_path)


# What travels


def test_a_dumped_config_reads_back_equal(tmp_path: Path) -> None:
    words = [
        "1e-4",
        "1_000",
        "null",
        "yes",
        "0x10",
        "1:30",
        "2020-01-01",
        "a: b",
        "#",
        " x ",
        "é\n",
    ]
    tree = {
        "words": words,
        "numbers": [1, 1.0, 1e-5, 1e22, -0.0, True, None],
        "share": {64: 0.5, "a": {}, "b": []},
    }
    loaded = config.load_resolved(tree, "x")
    text = config.dump(loaded)
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    for read in (
        config.load(tmp_path / "x.yaml").tree,
        OmegaConf.to_container(OmegaConf.create(text)),
    ):
        assert read == tree
        assert repr(read) == repr(tree)  # 1, 1.0 and True are equal and not the same


def test_differences_name_the_key_and_both_values() -> None:
    old = {"optimizer": {"lr": 0.001, "betas": [0.9, 0.999]}, "a": 1, "same": {"x": None}}
    new = {"optimizer": {"lr": 0.0001, "betas": [0.9, 0.99]}, "b": "x", "same": {"x": None}}
    assert config.differences(old, new) == [
        "optimizer.lr: 0.001 -> 0.0001",
        "optimizer.betas.1: 0.999 -> 0.99",
        "a: 1 -> absent",
        'b: absent -> "x"',
    ]
    assert config.differences({"a": 1, "b": {}}, {"a": True, "b": None}) == [
        "a: 1 -> true",
        "b: {} -> null",
    ]
    assert config.differences(old, old) == []


def test_config_imports_neither_torch_nor_lightning(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from diffusion_pl import config; "
        f"at = Path({str(folder)!r}); config.experiments(at); config.load('edm', (), at); "
        "print([name for name in ('torch', 'lightning', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
