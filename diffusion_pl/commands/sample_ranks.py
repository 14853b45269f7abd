"""Several processes that sample into one folder, which is all that they share.

Image i depends on (seed, i) alone, and batches are cut at multiples of their size, so every process
samples the same batches as one process would. The processes of a machine are started here; torchrun
and srun start others, and say by RANK or SLURM_PROCID which each is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from diffusion_pl.commands.options import RunOptions
from diffusion_pl.errors import UserError
from diffusion_pl.names import shown
from diffusion_pl.signals import end_with
from diffusion_pl.training.meeting import place_of

PATIENCE = 600.0  # seconds without a new image after which the other ranks count as lost
SLOWEST = 10.0  # times the longest batch of this process, where that is more
AGAIN = "the same command goes on"
LOOK = 0.5  # seconds between two looks at the folder


@dataclass(frozen=True)
class Rank:
    """Which of the processes this is.

    Args:
        number: from 0; rank 0 begins and finishes the folder.
        count: processes.
        local: number among those of this machine.
        starts: the others are started here.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    starts: bool = False

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.number == 0

    def options(self, options: RunOptions) -> RunOptions:
        """The options with a GPU of this process's own, where there are several."""
        several = self.count > 1 and options.device in ("auto", "cuda")
        if not several or not torch.cuda.is_available():
            return options
        number = self.local % torch.cuda.device_count()
        return dataclasses.replace(options, device=f"cuda:{number}")

    def batches(self, indices: Sequence[int], size: int) -> list[list[int]]:
        """The batches of this process: every count-th block of `size` images.

        Args:
            indices: of the images to sample, ascending.
            size: images a batch; block k has the indices k size .. (k + 1) size - 1.
        """
        blocks: dict[int, list[int]] = {}
        for index in indices:
            blocks.setdefault(index // size, []).append(index)
        return [each for block, each in blocks.items() if block % self.count == self.number]


def this_rank(processes: int | None) -> Rank:
    """Which rank this process is, by its option or by torchrun and srun.

    Args:
        processes: of the option.

    Raises:
        UserError: fewer than 1, or processes beside those of torchrun or srun.
    """
    number, count, local = place_of(os.environ)
    if processes is None:
        return Rank(number, count, local)
    if processes < 1:
        raise UserError(f"--processes must be at least 1 (got {processes})")
    if count > 1:
        raise UserError(f"--processes: {count} ranks were started already; leave it out")
    return Rank(0, processes, 0, starts=processes > 1)


def check_count(wanted: range, size: int, rank: Rank) -> None:
    """Refuse more processes than there are batches.

    Raises:
        UserError: says how many there can be.
    """
    most = len({index // size for index in wanted})
    if most < rank.count:
        smaller = len(wanted) // rank.count
        more = f", or --batch-size {smaller}" if smaller else ""
        raise UserError(
            f"{len(wanted):,} images are {most} {'batch' if most == 1 else 'batches'} of {size}, "
            f"fewer than the {rank.count} processes; use at most {most}{more}"
        )


@contextlib.contextmanager
def others(
    rank: Rank, work: Callable[..., None], arguments: dict[str, Any]
) -> Iterator[list[SpawnProcess]]:
    """Start the other processes, if this one does; they end with it.

    Args:
        rank: of this process.
        work: a function of a module, called with `rank` and the arguments.
        arguments: that can be pickled.
    """
    if not rank.starts:
        yield []
        return
    threads = torch.get_num_threads()
    share = max(1, threads // rank.count) if "OMP_NUM_THREADS" not in os.environ else threads
    torch.set_num_threads(share)
    context = multiprocessing.get_context("spawn")
    started = []
    for number in range(1, rank.count):
        own = Rank(number, rank.count, number)
        process = context.Process(
            target=_enter, args=(os.getpid(), share, work, own, arguments), daemon=True
        )
        process.start()
        started.append(process)
    try:
        yield started
    finally:
        for process in started:
            process.terminate()
            process.join()
        torch.set_num_threads(threads)


def _enter(
    parent: int, threads: int, work: Callable[..., None], rank: Rank, arguments: dict[str, Any]
) -> None:
    """The life of another process; a user's mistake is a line on stderr and code 2."""
    end_with(parent)
    torch.set_num_threads(threads)
    try:
        work(rank=rank, **arguments)
    except UserError as error:
        print(f"error: process {rank.number:d}: {shown(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def check_running(started: Sequence[SpawnProcess]) -> None:
    """Notice that one of the processes that this one started has failed.

    Raises:
        UserError: says its code.
    """
    failed = [process.exitcode for process in started if process.exitcode]
    if failed:
        raise UserError(
            f"{len(failed)} of the processes ended with code {failed[0]} before all images were "
            f"sampled; {AGAIN}"
        )


def wait_for(
    missing: Callable[[], Sequence[int]],
    started: Sequence[SpawnProcess],
    slowest: float,
    look: Callable[[int], None],
) -> None:
    """Wait until the other ranks have sampled their images.

    Args:
        missing: the indices that are not there yet.
        started: the processes that this one started.
        slowest: seconds of the longest batch of this process.
        look: called with the number of missing images at every look.

    Raises:
        UserError: one of the processes ended without its images, or none came for long.
    """
    limit, least, since = max(PATIENCE, SLOWEST * slowest), sys.maxsize, time.monotonic()
    while True:
        all_ended = all(process.exitcode is not None for process in started)
        left = len(missing())  # after that: whoever ended well has written all
        look(left)
        if not left:
            return
        check_running(started)
        if started and all_ended:
            raise UserError(f"the processes ended, and {left:,} images are missing; {AGAIN}")
        if left < least:
            least, since = left, time.monotonic()
        if time.monotonic() - since > limit:
            raise UserError(
                f"no image came for {limit:,.0f} s, and {left:,} are missing; see that all ranks "
                f"run; {AGAIN}"
            )
        time.sleep(LOOK)
