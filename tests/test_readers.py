"""Reading processes hand over what they read, in order, and leave nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from loaders import loader
from test_watchdog import gone

from diffusion_pl.data.crops import Crop
from diffusion_pl.data.order import Order
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.errors import UserError
from diffusion_pl.images import Images

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a service of Linux")


def loaded(stop, num_workers=0, **settings):
    images = Synthetic(40, 16).open()
    return loader(images, 5, stop, hflip=True, num_workers=num_workers, **settings)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_are_those_read_here_however_long_they_wait(workers):
    wanted = loaded(20, workers, crop=Crop(8, return_position=True), start=3)
    found = []
    for batch in wanted:
        found.append(batch)  # kept, while the readers use their memory again
        if len(found) in (1, 7):
            time.sleep(0.3)  # they may be as far ahead as they like
    assert len(found) == 17
    for step, batch in enumerate(found, start=3):
        here = wanted[step]
        assert list(batch) == list(here) == ["image", "index", "position", "label"]
        for name, tensor in here.items():
            assert torch.equal(batch[name], tensor), (step, name)
            assert batch[name].dtype == tensor.dtype


def test_no_batch_takes_more_than_is_set_aside_for_it():
    for crop in (None, Crop(8, return_position=True), Crop(15, return_position=True)):
        made = loaded(1, crop=crop)
        taken = sum(tensor.nbytes for tensor in made[0].values())
        assert 0.5 * made.most_bytes * (crop is not None and crop.size == 15) < taken
        assert taken <= made.most_bytes


def test_who_stops_early_leaves_no_reader_behind():
    before = set(multiprocessing.active_children())
    loader = iter(loaded(1000, 2))
    next(loader)
    readers = set(multiprocessing.active_children()) - before
    assert len(readers) == 2
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 1.5  # they were told, not killed after a while
    assert all(reader.exitcode is not None for reader in readers)


def test_a_reader_minds_no_signal_that_asks_the_run_to_stop():
    before = set(multiprocessing.active_children())
    loader = iter(loaded(50, 1))
    found = [next(loader)["index"][0].item()]
    (reader,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.kill(reader.pid, number)
    found += [batch["index"][0].item() for batch in loader]
    assert found == [5 * step for step in range(50)]


class Broken:
    """Images of which that in the fourth place of the run cannot be read."""

    shape = (9, 1, 1, 1)

    def __init__(self, error):
        self.error = error

    def read(self, indices):
        if indices.item() == Order(9, 0)(3, 4).item():
            raise self.error
        return torch.zeros(1, 1, 1, 1, dtype=torch.uint8)


def broken(error, num_workers=1):
    return loader(Images("broken", Broken(error), "f"), 1, 9, num_workers=num_workers)


def test_what_a_reader_finds_wrong_is_said_as_it_would_be_here():
    loader = iter(broken(UserError("shard 7: ends within it"), 2))
    assert [next(loader)["index"].item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"^shard 7: ends within it$"):
        next(loader)
    with pytest.raises(RuntimeError, match=r"(?s)in read.*ValueError: of the user's own"):
        list(broken(ValueError("of the user's own")))
    with pytest.raises(RuntimeError, match=r"(?s)in read.*KeyError: 'label'"):
        list(broken(KeyError("label")))
    with pytest.raises(RuntimeError, match=r"(?s)in read.*ConnectionResetError: by the server"):
        list(broken(ConnectionResetError("by the server")))


READING = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_readers import loaded
import multiprocessing
loader = iter(loaded(1000, 2))
next(loader), next(loader)
pids = [reader.pid for reader in multiprocessing.active_children()]
os.kill(pids[0], signal.SIGSTOP)
print(*pids, flush=True)
END
"""


@linux
@pytest.mark.parametrize(
    ("end", "code"), [("os.kill(os.getpid(), signal.SIGKILL)", -9), ("raise SystemExit(3)", 3)]
)
def test_readers_end_with_the_process_they_read_for_even_if_one_stands_still(end, code):
    text = READING.format(tests=str(Path(__file__).parent)).replace("END", end)
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    assert gone(pids, 10)
