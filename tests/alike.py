"""What each of three processes finds when it is held against the others; see test_sameness.py."""

from __future__ import annotations

import contextlib

import started
import torch
from torch import distributed

from diffusion_pl import locks
from diffusion_pl.training import sameness

WORLD = 3


def found(folder):
    """What every rank finds, in the order of the ranks.

    Args:
        folder: an empty one.
    """
    return started.answers(_find, WORLD, folder)


def _find(rank, ranks, folder):
    """What each comparison says on a rank, "" for nothing."""
    device = torch.device("cpu")

    def said(look):
        try:
            look()
        except ValueError as error:
            return str(error)
        return ""

    def agree(mine):
        return said(lambda: sameness.agree(mine, device))

    tree = {"optimizer": {"lr": 1e-3}, "data": {"dataset": {"path": f"/node{rank}/photographs"}}}
    alike = sameness.facts_of(tree, training_data={"count": 40}, start={"checkpoint": "16 ab"})
    more = {f"network.{number}": str(rank) for number in range(5)}
    run = folder / "shared"
    held = locks.hold(run / locks.NAME, "training") if rank == 0 else contextlib.nullcontext()
    with held as lock:
        token = lock.holder.token if lock else None
        distributed.barrier()
        answers = {
            "alike": agree(alike),
            "config": agree(alike | ({"optimizer.lr": "0.01"} if rank == 2 else {})),
            "data": agree(alike | {"training_data.count": "20" if rank else "40"}),
            "checkpoint": agree(alike | ({"start.checkpoint": "8 cd"} if rank == 1 else {})),
            "absent": agree(alike if rank else alike | {"trainer.grad_clip": "1"}),
            "much": agree(alike | more),
            "shared": said(lambda: sameness.share_folder(run, token, device)),
        }
        sameness._SHARED_WAIT = 1.0
        own = run if rank < 2 else folder / "own"
        answers["own"] = said(lambda: sameness.share_folder(own, token, device))
        answers["unlocked"] = said(lambda: sameness.share_folder(own, None, device))
        answers["first"] = sameness.from_first("zero" if rank == 0 else "", device)
        distributed.barrier()
    return answers
