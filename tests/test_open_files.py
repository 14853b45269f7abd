"""Shards stay open as far as the system lets them: reopening them costs more than reading."""

from __future__ import annotations

import os
import resource

import pytest
import torch
from sharded import pixels, source, write

from diffusion_pl.data import tars


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twenty images, of which each shard has one."""
    return write(tmp_path_factory.mktemp("sets") / "noise", shard_images=1)


@pytest.fixture
def few(monkeypatch):
    """Four files in place of 128; the process's own limits again afterwards."""
    monkeypatch.setattr(tars, "OPEN_FILES", 4)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def opened(monkeypatch):
    """Counts the shards that are opened."""
    found = []
    usual = os.open

    def counting(path, *words, **more):
        if str(path).endswith(".tar"):
            found.append(path)
        return usual(path, *words, **more)

    monkeypatch.setattr(os, "open", counting)
    return found


def read(made):
    images = source(made).open()
    for turn in range(3):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(turn))
        assert torch.equal(images.read(order), pixels(range(20), 16)[order])
    return images


def test_every_shard_is_opened_once(made, few, opened):
    images = read(made)
    assert len(opened) == 20
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(few[0] + 16, few[1])
    assert len(images) == 20


def test_where_the_limit_is_the_systems_it_is_shared(made, few, opened):
    soft = len(os.listdir("/proc/self/fd")) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, few[1]))
    assert tars._allowed(10) == 10
    assert tars._allowed(10**9) == few[1] - soft - 10 + (soft + 10) // 8
    assert tars._allowed(0) == tars._allowed(-5) == 0


def test_no_more_are_open_than_the_hard_limit_lets(made, few, opened):
    soft = len(os.listdir("/proc/self/fd")) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, few[1]))
    if os.geteuid() == 0 or few[1] > soft:
        read(made)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft + 16, few[1])
    assert len(opened) == 20


def test_a_process_that_has_run_out_closes_some_and_reads_on(made, few, opened, monkeypatch):
    monkeypatch.setattr(tars, "_allowed", lambda more: 16)  # as another part's files were not seen
    images = source(made).open()
    images.read(torch.tensor([0]))
    soft = len(os.listdir("/proc/self/fd")) + 6
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, few[1]))
    assert torch.equal(images.read(torch.arange(20)), pixels(range(20), 16))
    assert len(os.listdir("/proc/self/fd")) <= soft + 1


def test_a_few_shards_raise_no_limit(made, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    read(made)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
