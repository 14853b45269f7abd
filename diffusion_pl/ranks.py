"""What the processes of a run agree on: sums, pieces in order, and yes only from all of them.

Without a process group every function answers for the one process there is.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d


def rank() -> int:
    """This process's number."""
    return distributed.get_rank() if _several() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _several() else 1


def leads_machine() -> bool:
    """Whether this process is the first on its machine, the one that writes there."""
    return _started_as("LOCAL_RANK", "SLURM_LOCALID") == 0


def leads_run() -> bool:
    """Whether this process is the first of all, the one that speaks; known before they meet."""
    if "RANK" not in os.environ and {"LOCAL_RANK", "NODE_RANK"} & os.environ.keys():  # Lightning's
        return _started_as("LOCAL_RANK") == _started_as("NODE_RANK") == 0
    return _started_as("RANK", "SLURM_PROCID") == 0


def is_started_by_lightning() -> bool:
    """Whether the run's first process started this one, and ends all when one ends in an error.

    Those that srun or torchrun start are all alike.
    """
    return "RANK" not in os.environ and _started_as("LOCAL_RANK") != 0


def _started_as(*names: str) -> int:
    """The first of these numbers that whoever started this process has told it; 0 for none."""
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def rank_range(count: int, tile: int = 1, of: int | None = None) -> range:
    """A rank's share of `count` things: one block of whole tiles, none padded, none twice.

    Args:
        count: things 0, 1, ... in the order of the ranks.
        tile: how many stay together.
        of: the rank; this one when not given. Rank 0 has as many tiles as any.
    """
    tiles = -(-count // tile)
    number = rank() if of is None else of
    # Rounded up, so that the first rank has something to do whoever has not.
    first, last = (-(-tiles * (number + step) // world_size()) * tile for step in (0, 1))
    return range(min(first, count), min(last, count))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over the ranks; every rank calls it with the same shape.

    Args:
        values: left as they are.
    """
    if not _several():
        return values
    total = values.contiguous().clone()
    distributed.all_reduce(total)
    return total


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks in the order of the ranks, on every rank.

    Args:
        rows: (n, ...); n may differ between ranks, the rest may not.
    """
    if not _several():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(int(count) for count in counts)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    pieces = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(pieces, padded)
    return torch.cat([piece[: int(count)] for piece, count in zip(pieces, counts, strict=True)])


def all_agree(answer: bool, device: torch.device | str = "cpu") -> bool:
    """Whether every rank says yes.

    Args:
        answer: this rank's.
        device: one that the process group can talk on.
    """
    return int(sum_over_ranks(torch.tensor(int(not answer), device=device))) == 0


def wait_at_most(seconds: float) -> None:
    """From now on a rank that waits so long for the others fails.

    Raises:
        RuntimeError: the processes talk in a way that knows no limit.
    """
    if _several():
        # torch below 2.12 has it under a private name.
        name = "set_timeout" if hasattr(distributed, "set_timeout") else "_set_pg_timeout"
        home = distributed if name == "set_timeout" else distributed_c10d
        getattr(home, name)(timedelta(seconds=seconds))


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
