"""Collective operations over the ranks of a run; without a process group there is one rank."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d


def rank() -> int:
    """The rank of this process."""
    return distributed.get_rank() if _several() else 0


def world_size() -> int:
    """The number of ranks."""
    return distributed.get_world_size() if _several() else 1


def leads_machine() -> bool:
    """Whether this process is local rank 0, which writes on its machine."""
    return _started_as("LOCAL_RANK", "SLURM_LOCALID") == 0


def leads_run() -> bool:
    """Whether this process is rank 0, from the environment, before the ranks are connected."""
    if "RANK" not in os.environ and {"LOCAL_RANK", "NODE_RANK"} & os.environ.keys():  # Lightning's
        return _started_as("LOCAL_RANK") == _started_as("NODE_RANK") == 0
    return _started_as("RANK", "SLURM_PROCID") == 0


def is_started_by_lightning() -> bool:
    """Whether Lightning started this process from rank 0, rather than srun or torchrun."""
    return "RANK" not in os.environ and _started_as("LOCAL_RANK") != 0


def _started_as(*names: str) -> int:
    """The first of these environment variables that is set, as a number; 0 for none."""
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def rank_range(count: int, tile: int = 1, of: int | None = None) -> range:
    """The indices of a rank, of 0 .. count - 1: one block of whole tiles, without overlap.

    Args:
        count: indices of all ranks, divided in the order of the ranks.
        tile: indices that stay together.
        of: the rank; this one when not given.
    """
    tiles = -(-count // tile)
    number = rank() if of is None else of
    # Rounded up, so that rank 0 is never idle.
    first, last = (-(-tiles * (number + step) // world_size()) * tile for step in (0, 1))
    return range(min(first, count), min(last, count))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over the ranks of tensors of one shape; `values` is not changed."""
    if not _several():
        return values
    total = values.contiguous().clone()
    distributed.all_reduce(total)
    return total


def gather(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all ranks in rank order, on every rank; n may differ between ranks."""
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
    """Whether `answer` is true on every rank; `device` is one of the process group's."""
    return int(sum_over_ranks(torch.tensor(int(not answer), device=device))) == 0


def wait_at_most(seconds: float) -> None:
    """Set the time limit of collective operations.

    Raises:
        RuntimeError: the backend has none.
    """
    if _several():
        # torch below 2.12 has it under a private name.
        name = "set_timeout" if hasattr(distributed, "set_timeout") else "_set_pg_timeout"
        home = distributed if name == "set_timeout" else distributed_c10d
        getattr(home, name)(timedelta(seconds=seconds))


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
