"""`experiments`: one's own, and how many come with the package; all of them with --all."""

from __future__ import annotations

import pytest

from diffusion_pl import cli, config


@pytest.fixture
def listed(tmp_path, monkeypatch, capsys):
    """What the command prints in a folder, of which experiments/ may have one of one's own."""
    monkeypatch.chdir(tmp_path)

    def listed(*words):
        assert cli.main(["experiments", *words]) == 0
        out, said = capsys.readouterr()
        return [line.split("  ", 1) for line in out.splitlines()], said

    return listed


def own():
    config.EXPERIMENTS.mkdir()
    (config.EXPERIMENTS / "flowers.yaml").write_text(
        "# Flowers at 64 px\ntrainer: {total_images: 1}\n"
    )


def test_ones_own_are_listed_and_the_others_counted(listed):
    packaged = len(listed()[0])
    assert packaged > 5
    own()
    rows, said = listed()
    assert [[word.strip() for word in row] for row in rows] == [["flowers", "Flowers at 64 px"]]
    assert said == f"and {packaged} that come with the package: experiments --all\n"


def test_all_are_listed_on_request_and_none_is_said_to_be_left_out(listed):
    packaged = {row[0].strip() for row in listed()[0]}
    own()
    rows, said = listed("--all")
    assert {row[0].strip() for row in rows} == packaged | {"flowers"}
    assert not said


def test_without_ones_own_the_packages_are_listed(listed):
    rows, said = listed()
    assert "cifar10_edm" in {row[0].strip() for row in rows}
    assert all(len(row) == 2 and row[1].strip() for row in rows)
    assert not said
