"""One writer at a time: who holds a lock, who has died, and what either leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from diffusion_pl import locks, processes
from diffusion_pl.io.files import sweep, write_atomically

# Light processes: of this package they import the locks alone.
HOLD = """
import sys, time
from pathlib import Path
from diffusion_pl import locks
with locks.hold(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(60)
"""
RACE = """
import sys, time
from pathlib import Path
from diffusion_pl import locks
locks.read(Path(sys.argv[1]))
while time.time() < float(sys.argv[2]):
    pass
try:
    with locks.hold(Path(sys.argv[1]), "training"):
        print("won", flush=True)
        time.sleep(1.5)
except ValueError:
    print("lost", flush=True)
"""


@pytest.fixture
def start():
    """Start a program; what a test that fails leaves running is killed."""
    begun = []

    def call(program, *words):
        command = [sys.executable, "-c", program, *map(str, words)]
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return begun[-1]

    yield call
    for each in begun:
        each.kill()
        each.communicate()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / locks.NAME


def write(path, **changes):
    """The lock of a holder like this process, but for changes."""
    path.parent.mkdir(exist_ok=True)
    holder = replace(locks.this_process("training"), **changes)
    path.write_text(json.dumps(asdict(holder)))
    return holder


def assert_free(path, seconds=1.0):
    began = time.monotonic()
    with locks.hold(path, "training") as lock:
        assert locks.read(path) == lock.holder
        assert time.monotonic() - began < seconds
    assert not path.exists()


def assert_held(path, who):
    with pytest.raises(ValueError, match=f"run: {who}.* holds it"), locks.hold(path, "training"):
        pass


def test_a_living_holder_is_named_and_a_killed_one_gives_way_at_once(path, start):
    holder = start(HOLD, path)
    assert holder.stdout.readline() == "held\n"
    assert_held(path, f"process {holder.pid} on {locks.this_process('').host}")
    assert locks.live_holder(path).process == holder.pid
    holder.send_signal(signal.SIGSTOP)  # it may go on, and then writes
    assert_held(path, f"process {holder.pid} on ")
    holder.kill()
    time.sleep(0.1)  # nobody has asked how it ended: its number is still taken
    assert locks.live_holder(path) is None
    assert_free(path)


def test_a_folder_that_was_copied_while_it_was_held_is_nobodys(path, start):
    """A run's folder copied aside while it trains is another run; one that was moved is not."""
    holder = start(HOLD, path)
    assert holder.stdout.readline() == "held\n"
    copy, moved = (path.parent.with_name(name) / path.name for name in ("copy", "moved"))
    shutil.copytree(path.parent, copy.parent)
    assert locks.live_holder(copy) is None
    assert_free(copy)
    assert_held(path, f"process {holder.pid} on ")
    path.parent.rename(moved.parent)
    with pytest.raises(ValueError, match="holds it"), locks.hold(moved, "training"):
        pass
    # Another run begins where the moved one lay: its lock says nothing of the one that moved.
    another = start(HOLD, path)
    assert another.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="holds it"), locks.hold(moved, "training"):
        pass


@pytest.mark.parametrize("number", [10**30, 2**63, -1, 0])
def test_a_number_that_no_process_has_holds_nothing(number, path):
    write(path, process=number)
    assert_free(path)
    ours = processes.temporary(path)
    left = ours.with_name(ours.name.replace(f"-{os.getpid()}-", f"-{abs(number)}-"))
    assert processes.is_leftover(left)


def test_of_many_that_take_a_dead_ones_lock_one_wins(path, start):
    write(path, process=2**22 + 1)  # more than Linux gives
    began = time.time() + 1.0
    racing = [start(RACE, path, began) for _ in range(6)]
    ends = [process.communicate(timeout=60)[0] for process in racing]
    assert sorted(ends) == ["lost\n"] * 5 + ["won\n"]


def test_another_process_of_the_same_number_is_not_the_holder(path):
    mine = locks.this_process("training")
    write(path, began=mine.began - 1, token="before")
    assert_free(path)
    write(path, token="before")
    assert_held(path, f"process {os.getpid()} on")


@pytest.mark.parametrize("text", ["", '{"host": "a"', "[]", '{"host": 1}', "[" * 5000])
def test_what_a_crash_left_of_a_lock_is_no_lock(text, path):
    path.parent.mkdir()
    path.write_text(text)
    assert locks.read(path) is None
    assert_free(path)


def test_a_job_that_was_started_again_takes_over_at_once(path, monkeypatch):
    elsewhere = {"place": "elsewhere", "host": "lost", "job": "12"}
    monkeypatch.setattr(locks, "DEAD_AFTER", 30.0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write(path, **elsewhere, restart=0)
    assert_free(path)
    monkeypatch.setattr(locks, "DEAD_AFTER", 0.3)
    monkeypatch.setattr(locks, "BEAT", 0.05)
    for job, restart in (("12", 1), ("13", 0)):  # not an earlier start of this job
        write(path, **elsewhere | {"job": job}, restart=restart)
        began = time.monotonic()
        assert_free(path, seconds=5)
        assert time.monotonic() - began > 0.3


def test_elsewhere_only_the_heartbeat_tells(path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "DEAD_AFTER", 1.0)
    write(path, place="elsewhere", host="far", process=7, token="theirs")
    ended = threading.Event()

    def beat():
        while not ended.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert_held(path, "process 7 on far")
    finally:
        ended.set()
        thread.join()
    assert "run: process 7 on far holds it (training); waiting up to 1 s" in capsys.readouterr().err
    assert_free(path, seconds=5)


def test_a_holder_gives_signs_of_life(path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with locks.hold(path, "training"):
        os.utime(path, (0, 0))
        until = time.monotonic() + 5
        while path.stat().st_mtime == 0:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_what_was_taken_over_is_neither_written_under_nor_given_back(path):
    with locks.hold(path, "training") as lock:
        lock.check()
        path.unlink()
        lock.check()  # somebody removed it: it is made again
        assert locks.read(path) == lock.holder
        other = write(path, token="theirs", host="far")
        with pytest.raises(locks.LockLostError, match="on far has taken it over"):
            lock.check()
    assert locks.read(path) == other


def test_a_lock_follows_no_link_and_waits_for_no_pipe(path, tmp_path):
    path.parent.mkdir()
    target = tmp_path / "target"
    target.write_text("precious")
    path.symlink_to(target)
    with pytest.raises(ValueError, match="cannot be locked"), locks.hold(path, "training"):
        pass
    assert target.read_text() == "precious"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="cannot be locked"), locks.hold(path, "training"):
        pass


def test_only_one_looks_at_a_lock_at_a_time(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    entered, seen = threading.Event(), []

    def second():
        with locks._guarded(path) as file:
            seen.append(os.fstat(file).st_ino == path.stat().st_ino)
            entered.set()

    other = threading.Thread(target=second)
    with locks._guarded(path):
        other.start()
        assert not entered.wait(0.3)
        path.unlink()  # as a holder does that leaves
    assert entered.wait(30)
    other.join()
    assert seen == [True]  # the file that is there, not the one that is gone


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run" / locks.NAME
    with pytest.raises(ValueError, match="cannot be written"), locks.hold(path, "training"):
        pass


def test_the_sweep_removes_what_the_dead_have_left_and_nothing_else(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    mine = processes.temporary(folder / "8.ckpt").name
    dead = mine.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")
    reused = mine.replace(f"-{os.getpid()}-", f"-{os.getpid()}-1")
    far = ".8.ckpt.0badcafe-7-7.tmp"
    stays = {mine, far, ".notes.tmp", "notes.tmp", ".8.ckpt.123.tmp", "000000000008.ckpt"}
    old = {".9.ckpt.0badcafe-7-7.tmp", ".9.ckpt.123.tmp"}
    ancient = {"notes.tmp", "000000000008.ckpt"}  # nobody's who writes atomically
    for name in {dead, reused} | stays | old:
        (folder / name).write_text("")
    for name in old | ancient:
        os.utime(folder / name, (time.time() - 2 * processes.LEFT_AFTER,) * 2)
    assert not any(processes.is_leftover(folder / name) for name in ancient)
    sweep(tmp_path)
    assert {path.name for path in folder.iterdir()} == stays


def test_a_file_that_is_being_written_is_seen_as_such(tmp_path):
    names = []

    def look(file):
        sweep(tmp_path)
        names.extend(path.name for path in tmp_path.iterdir())

    write_atomically(tmp_path / "rows.jsonl", look)
    assert names == [processes.temporary(tmp_path / "rows.jsonl").name]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
