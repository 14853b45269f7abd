"""Trying an optimizer before a training: its settings, and one step of tiny parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from diffusion_pl.errors import UserError
from diffusion_pl.training.optimizers import MakeOptimizer, make
from diffusion_pl.training.uncompiled import without_compiler


def tried(maker: MakeOptimizer, named: Mapping[str, int]) -> Optimizer:
    """Try an optimizer: make it for tiny parameters and step once.

    Args:
        maker: `Grouped`, or a torch optimizer.
        named: number of dimensions of each parameter, by name.

    Raises:
        UserError: it cannot be made, or cannot step.
    """
    pairs = [(name, nn.Parameter(torch.zeros((1,) * ndim))) for name, ndim in named.items()]
    for _, parameter in pairs:
        parameter.grad = torch.zeros_like(parameter)
    with without_compiler():
        return _step(maker, pairs)


def _step(maker: MakeOptimizer, pairs: Sequence[tuple[str, nn.Parameter]]) -> Optimizer:
    try:
        made = make(maker, pairs)
    except (TypeError, ValueError) as error:
        raise UserError(_line(error)) from error
    if not isinstance(made, Optimizer):
        raise UserError(f"must make an optimizer of torch's (got a {type(made).__name__})")
    try:
        made.step()
    except (TypeError, RuntimeError) as error:
        raise UserError(
            f"{type(made).__name__} cannot make a step of this training ({_line(error)})"
        ) from error
    return made


def _line(error: Exception) -> str:
    hint = "; diffusion_pl.training.optimizers.Grouped gives it these alone"
    text = " ".join(str(error).split())
    return text + hint if "only supports 2D" in text else text
