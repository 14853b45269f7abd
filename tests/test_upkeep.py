"""Files that are looked after: verified, converted, written on a full disk, never run."""

from __future__ import annotations

import contextlib
import json
import pickle
import resource

import pytest
import torch
import webdataset
from hostile import Runs
from prepared import file, fill, noise
from sharded import write

from diffusion_pl.cli import main
from diffusion_pl.data import write_shards
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History


def answer(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def saved(path, images, value=0.0, number=checkpoints.FORMAT):
    section = {"format": number, "images": images, "config": {"seed": 1}}
    tree = {"state_dict": {"ema.w": torch.full((300,), value)}, "diffusion_pl": section}
    path.parent.mkdir(parents=True, exist_ok=True)
    if number == 1:
        torch.save(tree, path)  # as it was written before there was a digest
    else:
        checkpoints.save(tree, path)
    return path


@contextlib.contextmanager
def room_for(size):
    """No file may grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_sound_data_is_said_to_be_sound(tmp_path, capsys):
    folder = write(tmp_path / "set")
    told = answer(capsys, "verify", folder)
    assert (told["images"], told["shards"]) == (20, 4)
    assert told["bytes"] == sum(path.stat().st_size for path in folder.glob("shards/*"))


def test_every_damaged_file_of_a_set_has_a_line(tmp_path, capsys):
    folder = write(tmp_path / "set")
    index, first, last = (folder / name for name in ("index.npy", *shards_of(folder)))
    for path in (index, first):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # the last byte of a tar's padding
        path.write_bytes(data)
    last.unlink()
    assert main(["verify", str(folder)]) == 2
    lines = capsys.readouterr().err.removeprefix("error: ").splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(index), str(first), str(last)]
    assert "is damaged" in lines[1]
    assert "cannot be read (No such file" in lines[2]


def shards_of(folder):
    paths = sorted(path.relative_to(folder) for path in folder.glob("shards/*"))
    return paths[0], paths[-1]


def test_a_run_s_checkpoints_are_verified_and_those_without_a_digest_counted(tmp_path, capsys):
    files = [saved(tmp_path / f"checkpoints/{n:012d}.ckpt", n, number=n) for n in (1, 2)]
    told = answer(capsys, "verify", tmp_path)
    assert told["checkpoints"] == [str(file) for file in files]
    assert told["without_digest"] == 1


def test_what_is_neither_data_nor_a_run_is_named(tmp_path, capsys):
    for command in ("verify", "convert"):
        assert main([command, str(tmp_path / "nothing")]) == 2
        assert f"error: {tmp_path}/nothing: neither" in capsys.readouterr().err


def test_old_checkpoints_are_converted_in_place_to_the_same_content(tmp_path, capsys):
    old = saved(tmp_path / "checkpoints/000000000008.ckpt", 8, value=3.0, number=1)
    new = saved(tmp_path / "checkpoints/000000000016.ckpt", 16)
    kept = new.read_bytes()
    told = answer(capsys, "convert", tmp_path)
    assert told == {"format": 2, "files": 2, "converted": [str(old)]}
    assert new.read_bytes() == kept
    found = checkpoints.load(old)
    assert torch.equal(found["state_dict"]["ema.w"], torch.full((300,), 3.0))
    assert found["diffusion_pl"] == {"format": 2, "images": 8, "config": {"seed": 1}}
    assert answer(capsys, "verify", old)["without_digest"] == 0
    data = bytearray(old.read_bytes())
    data[700] ^= 1
    old.write_bytes(data)
    with pytest.raises(checkpoints.DamagedError):
        checkpoints.load(old)
    assert answer(capsys, "convert", new)["converted"] == []


def test_a_full_disk_leaves_the_checkpoint_before_and_one_line(tmp_path):
    path = saved(tmp_path / "000000000008.ckpt", 8)
    before = path.read_bytes()
    with room_for(len(before) - 100), pytest.raises(ValueError, match=r"cannot be written.*free"):
        saved(path, 8, value=1.0)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_stops_prepare_in_one_line_and_it_goes_on(tmp_path, capsys):
    fill(tmp_path / "photos", {f"{n}.png": file(noise(n, 32, 32)) for n in range(4)})
    words = ["prepare", str(tmp_path / "photos"), str(tmp_path / "set"), "--resolutions", "32"]
    with room_for(8_000):
        assert main([*words, "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert "shards/000000.tar: cannot be written (File too large)" in error
    assert error.count("\n") == 1
    assert answer(capsys, *words)["images"] == 4


def test_a_last_line_that_a_crash_cut_off_is_dropped_and_not_joined(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    history.append({"images": 8})
    with history.path.open("ab") as opened:
        opened.write(b'{"images": 16, "loss": \xff')
    assert history.rows() == [{"images": 8}]
    history.rewind(8)
    history.append({"images": 16})
    assert history.rows() == [{"images": 8}, {"images": 16}]


def test_whoever_reads_tars_with_webdataset_beside_us_runs_nothing(tmp_path, monkeypatch):
    assert write_shards  # importing it is what counts
    monkeypatch.chdir(tmp_path)
    for ending in ("pyd", "pkl", "pickle", "pth"):
        with pytest.raises(ValueError, match="for security reasons"):
            webdataset.autodecode.decoders[ending](pickle.dumps(Runs()))
    with pytest.raises(ValueError, match="cannot open pipe"):
        webdataset.gopen("pipe:touch ran")
    assert not (tmp_path / "ran").exists()
