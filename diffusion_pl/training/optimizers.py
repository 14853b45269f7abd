"""Optimizers for groups of parameters, chosen by name and shape.

Muon (Jordan 2024) for the matrices of a JiT's blocks, Adam for all else, and no weight decay for
biases is one node; docs/python.md says more:

    optimizer:
      _target_: diffusion_pl.training.optimizers.Grouped
      rest: {_target_: torch.optim.AdamW, _partial_: true, lr: 1e-3, weight_decay: 0.01}
      groups:
        - _target_: diffusion_pl.training.optimizers.Group
          names: ["blocks.*"]
          ndim: 2
          optimizer: {_target_: torch.optim.Muon, _partial_: true, lr: 0.02}
        - {_target_: diffusion_pl.training.optimizers.Group, names: ["*.bias"], weight_decay: 0.0}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer

from diffusion_pl.errors import UserError

MakeOptimizer = Callable[..., Optimizer]
NETWORK = "denoiser.network."  # before the names that a network's own parameters have


@dataclass(frozen=True)
class Group:
    """Parameters with an optimizer or settings of their own.

    Args:
        names: patterns with * and ?, one of which must match a parameter's name in the network,
            such as `*.bias`; the objective's parameters are called `objective.*`.
        ndim: number of dimensions, such as 2 for matrices; None for any.
        optimizer: makes their optimizer; None: that of the rest.
        lr: learning rate; None: the optimizer's.
        weight_decay: 0 to exempt them; None: the optimizer's.
    """

    names: Sequence[str] = ("*",)
    ndim: int | None = None
    optimizer: MakeOptimizer | None = None
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.settings().items():
            if value < 0:
                raise UserError(f"{name} must not be negative (got {value})")

    def takes(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter belongs to the group."""
        fits = self.ndim is None or parameter.ndim == self.ndim
        return fits and any(fnmatchcase(name, pattern) for pattern in self.names)

    def settings(self) -> dict[str, float]:
        """Settings that override the optimizer's."""
        own = {"lr": self.lr, "weight_decay": self.weight_decay}
        return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class Grouped:
    """Makes one optimizer from several; a parameter belongs to the first group that matches.

    Args:
        rest: makes the optimizer of the parameters that match no group.
        groups: in order of precedence.
    """

    rest: MakeOptimizer
    groups: Sequence[Group]

    def __call__(self, named: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        """The optimizer of named parameters.

        Raises:
            UserError: a group without parameters, or a setting that its optimizer does not have.
        """
        taken: list[list[nn.Parameter]] = [[] for _ in self.groups]
        left: list[nn.Parameter] = []
        names: list[str] = []
        for full, parameter in named:
            names.append(name := full.removeprefix(NETWORK))
            takes = [group.takes(name, parameter) for group in self.groups]
            (taken[takes.index(True)] if any(takes) else left).append(parameter)
        # The groups of one optimizer stay together, the rest first.
        made: dict[int, tuple[MakeOptimizer, list[dict[str, Any]]]] = {}
        if left:
            made[-1] = (self.rest, [{"params": left}])
        for number, (group, mine) in enumerate(zip(self.groups, taken, strict=True)):
            if not mine:
                raise UserError(f"groups.{number}: {_nothing(group, names)}")
            own = number if group.optimizer is not None else -1
            made.setdefault(own, (group.optimizer or self.rest, []))[1].append(
                {"params": mine, **group.settings()}
            )
        optimizers = [_made(maker, lists) for maker, lists in made.values()]
        return optimizers[0] if len(optimizers) == 1 else Together(optimizers)


def _nothing(group: Group, names: Sequence[str]) -> str:
    """End of the error line for a group without parameters."""
    shape = "" if group.ndim is None else f" with {group.ndim} dimensions"
    some = ", ".join(names[:: max(1, len(names) // 6)])
    return (
        f"no parameter{shape} is called {' or '.join(group.names) or 'so'} that an earlier group "
        f"does not take; the names are such as {some}"
    )


def _made(maker: MakeOptimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """One optimizer; refuses settings that it would ignore."""
    optimizer = maker(groups)
    for name in {name for group in groups for name in group} - {"params"}:
        if name not in optimizer.defaults:
            raise UserError(f"{type(optimizer).__name__} has no {name}; leave it out")
    return optimizer


class Together(Optimizer):
    """Several optimizers as one, with one step and one state dict.

    So gradients are clipped together, and an fp16 overflow skips the step of all.

    Args:
        optimizers: of different parameters.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give each its own groups, and all the same state."""
        first = 0
        for each in self.optimizers:
            count = len(each.param_groups)
            each.param_groups = self.param_groups[first : first + count]
            each.state = self.state
            first += count

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for each in self.optimizers:
            each.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def optimizer_of(maker: MakeOptimizer, module: nn.Module) -> Optimizer:
    """The optimizer of a module's trainable parameters."""
    return make(maker, [(name, p) for name, p in module.named_parameters() if p.requires_grad])


def make(maker: MakeOptimizer, named: Sequence[tuple[str, nn.Parameter]]) -> Optimizer:
    """The optimizer of named parameters."""
    return maker(named) if isinstance(maker, Grouped) else maker([each for _, each in named])
