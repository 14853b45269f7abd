"""Processes that read batches ahead and hand them over through memory of their own.

A reader shares memory for a few batches with the process that trains, and a line: a batch's layout
goes one way along it when the batch is in its place, a word that the place is free again the other
way. torch's DataLoader makes and maps a file for every tensor instead, which for small images costs
several times the reading (benchmarks/data.py), and does not notice a reader that stands still while
it hands one over.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
import traceback
import warnings
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Protocol

import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.signals import SIGNALS, end_with

AHEAD = 2  # batches that a reader has ready

_LINE = 64  # bytes that tensors begin at multiples of
_SECONDS_TO_LEAVE = 2.0  # for a reader that is told, before it is killed

# Where in the memory each tensor of a batch lies: dtype, shape, first byte.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...], int]]


class ReaderLostError(RuntimeError):
    """A reading process that was killed, or that gave nothing for too long."""


class Steps(Protocol):
    """A run as a map from a step to its batch, as `Loader` is."""

    @property
    def most_bytes(self) -> int:
        """No batch takes more."""

    def __getitem__(self, step: int, /) -> Mapping[str, Tensor]: ...


class Reader:
    """One process that reads some steps in order.

    Forked, so that it shares what is open and in memory; it ends with the process that made it.

    Args:
        batches: the run.
        steps: those that it reads.
    """

    def __init__(self, batches: Steps, steps: range) -> None:
        context = multiprocessing.get_context("fork")
        self._room = batches.most_bytes + 8 * _LINE
        self._memory = mmap.mmap(-1, AHEAD * self._room)
        self._line, theirs = context.Pipe()
        lines = (theirs, self._line)
        arguments = (batches, steps, self._memory, self._room, lines, os.getpid())
        self._process = context.Process(target=_read, args=arguments, daemon=True)
        with warnings.catch_warnings():
            # Python 3.12 warns of locks that threads may hold; a reader takes none of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()
        # It takes no signals but the last, which this process's own end would not send it.
        self._kill = weakref.finalize(self, self._process.kill)

    def next(self, limit: float, pin: bool = False) -> dict[str, Tensor]:
        """The batch of the next of its steps.

        Args:
            limit: seconds to wait for it.
            pin: into page-locked memory.

        Raises:
            ReaderLostError: it was killed, or gave nothing for so long.
            UserError: what it found wrong with the data.
            RuntimeError: any other error of it, with its traceback.
        """
        if not self._line.poll(limit):
            raise ReaderLostError(f"it gave nothing for {limit:g} s (trainer.read_timeout)")
        try:
            answer: Layout | Exception = self._line.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(_SECONDS_TO_LEAVE)
            raise ReaderLostError(f"it ended with code {self._process.exitcode}") from error
        if isinstance(answer, Exception):
            raise answer
        batch = {name: self._copy(place, pin) for name, place in answer.items()}
        with contextlib.suppress(ConnectionError):  # it is done, or the next batch will tell
            self._line.send(None)
        return batch

    def end(self) -> None:
        """End the process; safe to call twice."""
        self._line.close()  # which it notices between two batches
        self._process.join(_SECONDS_TO_LEAVE)
        self._kill()
        self._process.join()

    def _copy(self, place: tuple[torch.dtype, tuple[int, ...], int], pin: bool) -> Tensor:
        dtype, shape, first = place
        there = _at(self._memory, dtype, shape, first)
        return torch.empty(shape, dtype=dtype, pin_memory=pin).copy_(there)


def _at(memory: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], first: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=first).view(shape)


def _read(
    batches: Steps,
    steps: range,
    memory: mmap.mmap,
    room: int,
    lines: tuple[Connection, Connection],
    parent: int,
) -> None:
    """Read the steps, in a process of its own."""
    end_with(parent)
    line, theirs = lines
    theirs.close()  # or nobody could tell that they have closed it
    for number in SIGNALS:  # for the run, which still needs batches until it stops
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):  # nobody wants them any more
        for count, step in enumerate(steps):
            try:
                batch = batches[step]
            except Exception as error:
                known = isinstance(error, UserError)  # else a bug, whose place is to be seen
                line.send(UserError(str(error)) if known else RuntimeError(traceback.format_exc()))
                return
            if count >= AHEAD:
                line.recv()  # a place has become free
            line.send(_put(batch, memory, count % AHEAD * room))


def _put(batch: Mapping[str, Tensor], memory: mmap.mmap, first: int) -> Layout:
    layout: Layout = {}
    for name, tensor in batch.items():
        _at(memory, tensor.dtype, tensor.shape, first).copy_(tensor)
        layout[name] = (tensor.dtype, tuple(tensor.shape), first)
        first += -(-tensor.nbytes // _LINE) * _LINE
    return layout
