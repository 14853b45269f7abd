"""Processes that read batches ahead and hand them over through shared memory.

A reader shares memory for a few batches, and a pipe, with the training process: it sends the layout
of a batch when the batch is in memory, and receives None when that memory is free again. torch's
DataLoader makes and maps a file for every tensor instead, which for small images takes several
times as long as reading them (benchmarks/data.py), and does not notice a reader that hangs while it
hands one over.
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

_LINE = 64  # bytes; tensors are aligned to it
_SECONDS_TO_LEAVE = 2.0  # for a reader to end by itself, before it is killed

# Where in the memory each tensor of a batch lies: dtype, shape, first byte.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...], int]]


class ReaderLostError(RuntimeError):
    """A reading process that was killed, or that gave nothing for too long."""


class Steps(Protocol):
    """A map from a step to its batch, such as `Loader`."""

    @property
    def most_bytes(self) -> int:
        """Upper bound of a batch's bytes."""

    def __getitem__(self, step: int, /) -> Mapping[str, Tensor]: ...


class Reader:
    """A process that reads some steps in order.

    Forked, so that it shares open files and memory; it ends with its parent.

    Args:
        batches: of the run.
        steps: to read.
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
        # It ignores the signals that stop a run, so it is killed.
        self._kill = weakref.finalize(self, self._process.kill)

    def next(self, limit: float, pin: bool = False) -> dict[str, Tensor]:
        """The next batch.

        Args:
            limit: seconds to wait for it.
            pin: into page-locked memory.

        Raises:
            ReaderLostError: the process was killed, or gave nothing for so long.
            UserError: damaged data.
            RuntimeError: any other error in the process, with its traceback.
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
        with contextlib.suppress(ConnectionError):  # it has ended: noticed with the next batch
            self._line.send(None)
        return batch

    def end(self) -> None:
        """End the process; safe to call twice."""
        self._line.close()  # it ends between two batches
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
    theirs.close()  # or closing the other end would go unnoticed
    for number in SIGNALS:  # the run still needs batches until it stops
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has closed the pipe
        for count, step in enumerate(steps):
            try:
                batch = batches[step]
            except Exception as error:
                known = isinstance(error, UserError)  # else a bug: keep its traceback
                line.send(UserError(str(error)) if known else RuntimeError(traceback.format_exc()))
                return
            if count >= AHEAD:
                line.recv()  # memory of an earlier batch is free
            line.send(_put(batch, memory, count % AHEAD * room))


def _put(batch: Mapping[str, Tensor], memory: mmap.mmap, first: int) -> Layout:
    layout: Layout = {}
    for name, tensor in batch.items():
        _at(memory, tensor.dtype, tensor.shape, first).copy_(tensor)
        layout[name] = (tensor.dtype, tuple(tensor.shape), first)
        first += -(-tensor.nbytes // _LINE) * _LINE
    return layout
