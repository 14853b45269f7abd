"""torch.compile on a network: as a whole, or each of its blocks by itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from diffusion_pl.errors import UserError
from diffusion_pl.training.sharding import units

# Blocks of one class share compiled code, an entry for each of their shapes; beyond torch's own
# limit of 8 entries the rest would run without, in silence.
ENTRIES = 256


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network's module lists, without single layers.

    Raises:
        UserError: there is none.
    """
    found = [unit for unit in units(network) if any(True for _ in unit.children())]
    if not found:
        raise UserError(
            f"trainer.compile: blocks needs a network with blocks in an nn.ModuleList; "
            f"{type(network).__name__} has none; use true"
        )
    return found


def compile_network(network: nn.Module, how: bool | Literal["blocks"]) -> None:
    """Compile a network in place; the names of its weights stay.

    Args:
        network: the raw F.
        how: False for not at all, True as a whole, "blocks" each block by itself, so that equal
            blocks are compiled once and what is between them is not.

    Raises:
        UserError: it has no blocks.
    """
    if how == "blocks":
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, ENTRIES)
        for block in blocks(network):
            block.compile()
    elif how:
        network.compile()
