"""Shards that make themselves: an experiment's data written at its first start."""

from __future__ import annotations

import pytest
import torch

from diffusion_pl.data.prepare import Request
from diffusion_pl.data.recipe import Recipe
from diffusion_pl.data.shards import Shards
from diffusion_pl.data.sources.base import SourceSpec
from diffusion_pl.data.synthetic import Synthetic


def made(path, *resolutions):
    request = Request(SourceSpec("synthetic", count=20), Recipe(resolutions))
    return Shards(str(path), resolutions[0], made_of=request)


def test_they_hold_the_scenes_of_the_synthetic_set_at_every_size(tmp_path):
    shards, scenes = made(tmp_path / "set", 16, 8), Synthetic(20, 16)
    shards.prepare()
    for side in (16, 8):
        written, drawn = shards.open(side), scenes.open(side)
        assert torch.equal(written.read(torch.arange(20)), drawn.read(torch.arange(20)))
        assert torch.equal(written.labels, drawn.labels)
        assert written.fingerprint == drawn.fingerprint
        assert written.name == f"synthetic-{side}"


def test_they_are_made_once(tmp_path):
    made(tmp_path / "set", 16, 8).prepare()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "set").rglob("*")}
    made(tmp_path / "set", 16, 8).prepare()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "set").rglob("*")} == before


def test_another_wish_at_the_same_place_is_refused(tmp_path):
    made(tmp_path / "set", 16, 8).prepare()
    with pytest.raises(ValueError, match=r"holds another data set: resolutions is \[16, 8\]"):
        made(tmp_path / "set", 16).prepare()
