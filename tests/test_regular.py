"""What is no file is refused before it is opened: a pipe is waited for, a device has no end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from homes import trained
from test_cli import TINY

from diffusion_pl import processes
from diffusion_pl.cli import main
from diffusion_pl.images import save_png
from diffusion_pl.io.files import open_lock, regular, write_atomically


class Hangs(BaseException):
    """Nothing ended in time."""


@pytest.fixture(autouse=True)
def alarm():
    """End a test that waits for who writes a pipe."""

    def ring(*words):
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path):
    os.mkfifo(path)


def listening(path):
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's name is short
        made.bind(path.name)
        os.chdir(here)


def device(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


KINDS = {"a pipe": pipe, "a socket": listening, "a device": device, "a folder": folder}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run of one checkpoint."""
    return trained(
        tmp_path_factory.mktemp("home"),
        TINY.replace("total_images: 32", "total_images: 8").replace(
            "count: 20", "count: 20, metrics: []"
        ),
    )


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    save_png(torch.zeros(3, 8, 8, dtype=torch.uint8), tmp_path / "given.png")
    return tmp_path


def newest():
    return max(Path("runs/tiny/checkpoints").glob("*.ckpt"))


PREPARE = ["--resolutions", "8", "--workers", "1"]

# What a user, a run or a manifest names, and the command that reads it.
NAMED = {
    "an experiment": ("experiments/x.yaml", ["check", "experiments/x.yaml"]),
    "a run's config": ("runs/tiny/config.yaml", ["train", "tiny"]),
    "a run's history": ("runs/tiny/metrics.jsonl", ["train", "tiny"]),
    "a run's pointer": ("runs/tiny/checkpoints/latest", ["sample", "runs/tiny"]),
    "a run's checkpoint": (None, ["sample", "runs/tiny"]),
    "an image of a folder": ("set/a.png", ["prepare", "set", "to", *PREPARE]),
    "a table of a folder": ("set/a.parquet", ["prepare", "set", "to", *PREPARE]),
    "a tar of a folder": ("set/a.tar", ["prepare", "set", "to", *PREPARE]),
    "a database": ("set/data.mdb", ["prepare", "set", "to", *PREPARE]),
    "CIFAR-10": ("set/cifar-10-python.tar.gz", ["prepare", "set", "to", *PREPARE]),
    "a manifest": ("set/dataset.json", ["verify", "set"]),
    "an image": ("a.png", ["enlarge", "runs/tiny", "a.png"]),
    "a mask": ("m.png", ["inpaint", "runs/tiny", "given.png", "m.png"]),
    "images to measure": ("a.npz", ["evaluate", "a.npz", "--reference", "a.npz"]),
    "a reference": ("set/a.npz", ["evaluate", "runs/tiny", "--reference", "set/a.npz"]),
    "a published model": ("a.pkl", ["import", "edm", "a.pkl", "runs/new"]),
    "weights": ("a.safetensors", ["import", "safetensors", "a.safetensors", "runs/new"]),
}


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
@pytest.mark.parametrize("name", NAMED)
def test_what_is_named_and_no_file_is_one_line(place, capsys, name, kind):
    path, words = NAMED[name]
    path = newest() if path is None else Path(path)
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    capsys.readouterr()
    assert main(words) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_named(tmp_path, kind):
    path = tmp_path / "x"
    KINDS[kind](path)
    with pytest.raises(ValueError, match=f"x: is {kind}, not a file; name a regular file"):
        regular(path)
    path = tmp_path / "absent"
    assert regular(path) == path
    path.write_text("")
    (tmp_path / "link").symlink_to(path)
    assert regular(tmp_path / "link") == tmp_path / "link"


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_is_a_file_and_follows_no_link(tmp_path, kind):
    path = tmp_path / "lock"
    KINDS[kind](path)
    with pytest.raises(ValueError, match="lock: is a link or not a regular file"):
        open_lock(path)
    os.close(open_lock(tmp_path / "other"))
    os.close(open_lock(tmp_path / "other"))
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="link: is a link or not a regular file"):
        open_lock(tmp_path / "link")


def test_nothing_is_written_through_a_link_that_lies_in_wait(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    processes.temporary(tmp_path / "x").symlink_to(precious)
    with pytest.raises(ValueError, match="x: cannot be written"):
        write_atomically(tmp_path / "x", lambda file: file.write(b"theirs"))
    assert precious.read_text() == "mine"
