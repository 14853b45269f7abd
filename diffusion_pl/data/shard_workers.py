"""Processes that write shards in parallel.

A worker ends with its parent; those of concurrent.futures outlive a parent that was killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from diffusion_pl.errors import UserError
from diffusion_pl.signals import end_with

# Writes a shard: (number, call for an original left out, call after each original).
Write = Callable[[int, Callable[[str], None], Callable[[], None]], None]

_SECONDS_BETWEEN_REPORTS = 0.2


class WorkerLost(Exception):
    """A process that was killed, as the system does when memory runs out."""


@dataclass(frozen=True)
class Tally:
    """Counters shared by all processes.

    Args:
        done: originals of this run.
        skipped: originals left out, including those of earlier runs.
        next: index in the list of shards of the next one to write.
        allowed: how many originals may be left out.
        parent: process id.
    """

    done: Any
    skipped: Any
    next: Any
    allowed: int
    parent: int

    def advance(self) -> None:
        """Count an original; end this process when its parent is gone."""
        with self.done.get_lock():
            self.done.value += 1
        if os.getppid() != self.parent:
            os._exit(1)

    def skip(self, complaint: str) -> None:
        """Count an original that is left out.

        Raises:
            UserError: one more than allowed.
        """
        with self.skipped.get_lock():
            self.skipped.value += 1
            count = self.skipped.value
        if count > self.allowed:
            raise UserError(too_many(complaint, count, self.allowed))

    def take(self) -> int:
        """The place of the next shard to write."""
        with self.next.get_lock():
            self.next.value += 1
            return int(self.next.value) - 1


def too_many(complaint: str, count: int, allowed: int) -> str:
    """The error for a broken original that may not be skipped."""
    if allowed:
        return f"{complaint}; it is broken image {count} of {allowed} that --skip-broken allows"
    return f"{complaint}; pass over such images by --skip-broken N, or remove it"


def write_all(
    write: Write,
    numbers: Sequence[int],
    *,
    workers: int,
    skipped: int,
    allowed: int,
    report: Callable[[int], None],
) -> None:
    """Write shards.

    Args:
        write: a shard, in a process of its own.
        numbers: of the shards.
        workers: processes.
        skipped: originals that earlier runs left out.
        allowed: how many may be left out in all.
        report: called a few times a second with the number of originals done in this run.

    Raises:
        UserError: an unreadable original, or a full disk.
        WorkerLost: a process was killed.
    """
    # A fork shares open files and memory; without it everything is pickled.
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    tally = Tally(
        done=context.Value("q", 0),
        skipped=context.Value("q", skipped),
        next=context.Value("q", 0),
        allowed=allowed,
        parent=os.getpid(),
    )
    running: dict[Any, tuple[BaseProcess, Connection]] = {}
    try:
        for _ in range(min(workers, len(numbers))):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(write, numbers, tally, theirs), daemon=True
            )
            process.start()
            theirs.close()
            running[process.sentinel] = (process, ours)
        while running:
            for ended in wait(list(running), timeout=_SECONDS_BETWEEN_REPORTS):
                _judge(*running.pop(ended))
            report(tally.done.value)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _judge(process: BaseProcess, words: Connection) -> None:
    """Raise the error of a process that has ended, if any."""
    process.join()
    try:
        complaint = words.recv() if words.poll() else None
    except EOFError:
        complaint = None
    if complaint is not None:
        raise UserError(complaint)
    if process.exitcode:
        raise WorkerLost(
            f"a worker ended with code {process.exitcode} (-9: killed, perhaps for memory); the "
            f"same command goes on, --workers 1 needs least"
        )


def _work(write: Write, numbers: Sequence[int], tally: Tally, words: Connection) -> None:
    """Write shards until none is left, in a process of its own."""
    # The parent ends its workers; an interrupt from the keyboard reaches all of them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(tally.parent)  # whose lock on the folder is taken over as soon as it has ended
    try:
        while (place := tally.take()) < len(numbers):
            write(numbers[place], tally.skip, tally.advance)
    except ValueError as error:
        words.send(str(error))
