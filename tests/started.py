"""Runs of one and several ranks, each a process forked from one that has imported everything.

They meet as torchrun's do, and nobody looks after them: a rank that loses the others has to notice.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait

import torch
from torch import distributed, multiprocessing

from diffusion_pl.cli import main

LIMIT = 90.0  # seconds for everything
OTHERS = 35.0  # from the end of the first rank to that of the others, before they are killed


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Args:
        codes: exit codes of the ranks, -9 for a killed one, None for one that was still there.
        seconds: from the end of the first rank to the end of the last that ended.
    """

    codes: list[int | None]
    seconds: float


def train(place, run, *words, ranks=1, faults=None, limit=LIMIT):
    """Train `experiments/tried.yaml` to its end or to a fault.

    Args:
        place: the folder where the command runs.
        run: name of the run's folder.
        words: further overrides.
        ranks: processes.
        faults: by rank, what FAULT is in its environment; see faults.py.
        limit: seconds after which what is left is killed.
    """
    words = ["train", "tried", "--run", f"runs/{run}", f"trainer.devices={ranks}", *words]
    processes = begin([place] * ranks, words, faults=faults)
    until = time.monotonic() + limit
    first = last = None
    left = {process.sentinel for process in processes}
    while left and time.monotonic() < until:
        gone = wait(list(left), timeout=max(0.0, until - time.monotonic()))
        left -= set(gone)
        if gone:
            last = time.monotonic()
            first = first or last
            until = min(until, first + OTHERS)
    codes = [None if process.sentinel in left else process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return Ended(codes, (last or until) - (first or until))


def begin(places, words, faults=None, log=None):
    """Start a command in as many processes as it has places.

    Args:
        places: the folder where each process runs.
        words: of the command.
        faults: as for `train`.
        log: a file for what they print, emptied first; they print as this process does otherwise.

    Returns:
        The processes, each the first of a group of its own.
    """
    context, port, ranks = _server(), _free_port(), len(places)
    if log is not None:
        log.write_bytes(b"")
    processes = [
        context.Process(
            target=_rank,
            args=(rank, ranks, port, str(place), words, (faults or {}).get(rank, ""), log),
        )
        for rank, place in enumerate(places)
    ]
    for process in processes:
        process.start()
    return processes


def ended(process, limit=LIMIT):
    """The exit code of a process, once it has ended; None, and it is killed, if it does not."""
    process.join(limit)
    code = process.exitcode
    process.kill()
    process.join()
    return code


def answers(ask, ranks, *more):
    """What each of several processes that have met answers, in the order of the ranks.

    Args:
        ask: called with the rank, their number and what follows, all of which pickle takes.
        ranks: processes.
        more: arguments.
    """
    context, port = _server(), _free_port()
    queue = context.Queue()
    processes = [
        context.Process(target=_answer, args=(queue, port, ask, rank, ranks, *more))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        return [answer for _, answer in sorted(queue.get(timeout=LIMIT) for _ in processes)]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
            process.join()


def _answer(queue, port, ask, rank, ranks, *more):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    queue.put((rank, ask(rank, ranks, *more)))
    distributed.barrier()  # none leaves while another still asks it


def _server():
    """What forks processes that have everything imported: seconds less than a start of each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "faults", "diffusion_pl.commands.train"])
    return context


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rank(rank, world_size, port, place, words, fault, log):
    """What each process does; its exit code is the command's."""
    if log is not None:
        with log.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of reading processes, as by default
    os.setpgid(0, 0)  # a node of its own, with all that it starts
    os.chdir(place)
    os.environ["FAULT"] = fault
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                       "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "TORCHELASTIC_RUN_ID": "tried"}  # fmt: skip
    kind, _, at = fault.partition(":")
    if kind in ("save-full", "save-kill"):
        # Of files the output is none: the limit would count it where it goes into one.
        output = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        os.dup2(output.stdin.fileno(), 1)
        os.dup2(output.stdin.fileno(), 2)
        # Python ignores SIGXFSZ, and a write fails as on a full disk; by default it kills.
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(at), resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kind == "save-kill" else signal.SIG_IGN)
    sys.exit(main([str(word) for word in words]))
