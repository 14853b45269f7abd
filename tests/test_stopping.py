"""Signals: a run ends between two steps with a checkpoint, and later at the bits of any other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import started
import torch
from homes import experiments
from test_cli import TINY

from diffusion_pl import signals
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import stopping
from diffusion_pl.training.history import History

# Long enough to be hit on the way, and quick to finish.
LONG = TINY.replace("total_images: 32, checkpoint_every: 8, log_every: 8", "total_images: 640, "
                    "checkpoint_every: 320, log_every: 8, loggers: []")  # fmt: skip
LONG = LONG.replace("every: 16, count: 20", "every: 320, count: 20")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the experiment and a run of it that nobody stopped."""
    folder = tmp_path_factory.mktemp("place")
    experiments(folder, LONG)
    assert finish(folder, "straight") == 0
    return folder


def words(run, devices=1):
    more = [f"trainer.devices={devices}", "network.dropout=0.0"]
    return ["train", "tiny", "--run", f"runs/{run}", *more]


def finish(place, run):
    (process,) = started.begin([place], words(run), log=place / f"{run}.log")
    return started.ended(process)


def wait_for_steps(place, run, alive):
    """Wait until a run has done some."""
    until = time.monotonic() + 120
    while not History(place / "runs" / run / "metrics.jsonl").rows():
        assert alive() and time.monotonic() < until, said(place, run)
        time.sleep(0.01)


def said(place, run):
    return (place / f"{run}.log").read_text()


def weights(place, run):
    loaded = checkpoints.load(checkpoints.latest(place / "runs" / run / "checkpoints"))
    return loaded["global_step"], loaded["state_dict"], loaded["optimizer_states"]


def test_a_stopped_run_goes_on_to_the_bits_of_one_that_was_not(place):
    name = "SIGTERM"
    (process,) = started.begin([place], words(name), log=place / f"{name}.log")
    wait_for_steps(place, name, process.is_alive)
    os.kill(process.pid, signal.Signals[name])
    assert started.ended(process) == signals.RESUMABLE, said(place, name)
    folder = place / "runs" / name
    assert (folder / signals.MARKER).read_text().strip() == name
    step, *_ = weights(place, name)
    assert 0 < step < 80
    assert f"stopped at {8 * step:,} of 640 images; the same command goes on" in said(place, name)
    # Nothing is torn: Adam has made as many steps as the run.
    assert finish(place, name) == 0
    assert not (folder / signals.MARKER).exists()
    for one, other in zip(weights(place, "straight"), weights(place, name), strict=True):
        assert_equal(one, other)
    first, second = (
        [
            (row["images"], row["name"], row["value"])
            for row in History(place / "runs" / run / "metrics.jsonl").rows()
            if "name" in row
        ]
        for run in ("straight", name)
    )
    assert first == second


def assert_equal(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


def test_all_ranks_stop_at_one_step_whoever_was_told(place):
    run = "two"
    command = [sys.executable, "-m", "diffusion_pl", *words(run, devices=2)]
    with (place / f"{run}.log").open("wb") as log:  # by Lightning's own launcher
        process = subprocess.Popen(
            command, cwd=place, stdout=log, stderr=log, start_new_session=True
        )
    wait_for_steps(place, run, lambda: process.poll() is None)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "diffusion_pl"], capture_output=True, text=True
    )
    (other,) = map(int, children.stdout.split())
    os.kill(other, signal.SIGUSR1)
    assert process.wait(timeout=30) == signals.RESUMABLE, said(place, run)
    until = time.monotonic() + 30
    while (alive := _alive(other)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive
    marker = (place / "runs" / run / signals.MARKER).read_text().strip()
    assert marker == "a signal to another rank"
    assert 0 < weights(place, run)[0] < 80


def _alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_second_interrupt_leaves_at_once():
    code = (
        "import signal, os, time\n"
        "from diffusion_pl.signals import StopRequest\n"
        "with StopRequest() as stop_request:\n"
        "    stop_request.wait_for_steps()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop_request.signal == signal.SIGINT\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(30)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == 130


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_sets_a_flag_and_goes_back_to_whom_it_was_taken_from(name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with signals.StopRequest() as stop_request:
        assert stop_request.signal is None
        stop_request.wait_for_steps()  # takes them again, as after Lightning
        os.kill(os.getpid(), number)
        assert (stop_request.signal, stop_request.name) == (number, name)
    assert signal.getsignal(number) == before


def test_a_signal_before_the_first_step_stops_at_once_but_a_second_one_not_again():
    with signals.StopRequest() as stop_request:
        with pytest.raises(signals.StopError):
            signal.raise_signal(signal.SIGTERM)
        assert stop_request.name == "SIGTERM"
        signal.raise_signal(signal.SIGUSR1)  # while it is on its way out


def test_asking_costs_a_hundredth_of_a_step_at_most(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stopping.ranks, "world_size", lambda: 2)
    monkeypatch.setattr(stopping.ranks, "sum_over_ranks", lambda values: 2 * values)
    asked = []

    def all_agree(yes, device):
        asked.append(yes)
        clock[0] += 0.2e-3
        return yes

    monkeypatch.setattr(stopping.ranks, "all_agree", all_agree)
    stop_request = signals.StopRequest()
    agreement = stopping.Agreement(stop_request, torch.device("cpu"))
    for _ in range(1000):
        clock[0] += 1e-3  # a step
        assert not agreement.reached()
    assert agreement.every in (20, 21)  # rounded up
    assert len(asked) < 70
    stop_request.signal = signal.SIGTERM
    assert sum(agreement.reached() for _ in range(agreement.every)) == 1
