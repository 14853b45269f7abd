"""Which optimizer moves which parameters, and how fast: groups by name and shape.

Muon (Jordan 2024) for the matrices inside a network, Adam for all else, and no weight decay for
biases is one node:

    optimizer:
      _target_: diffusion_pl.training.optimizers.Grouped
      rest: {_target_: torch.optim.AdamW, _partial_: true, lr: 1e-3, weight_decay: 0.01}
      groups:
        - _target_: diffusion_pl.training.optimizers.Group
          names: ["*blocks*"]
          ndim: 2
          optimizer: {_target_: torch.optim.Muon, _partial_: true, lr: 0.02}
        - {_target_: diffusion_pl.training.optimizers.Group, names: ["*.bias"], weight_decay: 0.0}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from diffusion_pl.errors import UserError

MakeOptimizer = Callable[..., Optimizer]
NETWORK = "denoiser.network."  # before the names that a network's own parameters have


@dataclass(frozen=True)
class Group:
    """Parameters that are moved in another way than the rest.

    Args:
        names: patterns with * and ?, of which one must fit a parameter's name in the network, such
            as `*.bias`; parameters that an objective has are called `objective.*`.
        ndim: dimensions that a parameter must have, such as 2 for matrices; None for any.
        optimizer: makes their optimizer; None: the rest's.
        lr: their learning rate; None: their optimizer's.
        weight_decay: theirs, 0 to exempt them; None: their optimizer's.
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
        """What differs from the group's optimizer."""
        own = {"lr": self.lr, "weight_decay": self.weight_decay}
        return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class Grouped:
    """Makes one optimizer of several: a parameter belongs to the first group that takes it.

    Args:
        rest: makes the optimizer of the parameters that no group takes.
        groups: in the order in which they are asked.
    """

    rest: MakeOptimizer
    groups: Sequence[Group]

    def __call__(self, named: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        """The optimizer of parameters with their names.

        Raises:
            UserError: a group that takes none, or a setting that its optimizer does not have.
        """
        taken: list[list[nn.Parameter]] = [[] for _ in self.groups]
        left: list[nn.Parameter] = []
        names: list[str] = []
        for full, parameter in named:
            names.append(name := full.removeprefix(NETWORK))
            takes = [group.takes(name, parameter) for group in self.groups]
            (taken[takes.index(True)] if any(takes) else left).append(parameter)
        # The groups of one optimizer stay together; the rest's are the first.
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
        return together([_made(maker, lists) for maker, lists in made.values()])


def _nothing(group: Group, names: Sequence[str]) -> str:
    """That a group takes no parameter, as the end of an error line."""
    shape = "" if group.ndim is None else f" with {group.ndim} dimensions"
    some = ", ".join(names[:: max(1, len(names) // 6)])
    return (
        f"no parameter{shape} is called {' or '.join(group.names) or 'so'} that an earlier group "
        f"does not take; the names are such as {some}"
    )


def _made(maker: MakeOptimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """One optimizer.

    Raises:
        UserError: a setting that it does not have, and would leave unread.
    """
    optimizer = maker(groups)
    for name in {name for group in groups for name in group} - {"params"}:
        if name not in optimizer.defaults:
            raise UserError(f"{type(optimizer).__name__} has no {name}; leave it out")
    return optimizer


class Together(Optimizer):
    """Several optimizers as one: a step moves them all, and they are saved as one.

    So gradients are clipped together, an overflow of fp16 leaves the step of all out, and a step
    counts once.

    Args:
        optimizers: of different parameters.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Hand each its own groups, and all of them the one table of what they remember."""
        first = 0
        for each in self.optimizers:
            count = len(each.param_groups)
            each.param_groups = self.param_groups[first : first + count]
            each.state = self.state
            first += count

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter once."""
        loss = None if closure is None else closure()
        for each in self.optimizers:
            each.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was saved."""
        super().load_state_dict(state_dict)
        self._share()


def together(optimizers: Sequence[Optimizer]) -> Optimizer:
    """One optimizer that is all of these."""
    return optimizers[0] if len(optimizers) == 1 else Together(optimizers)


def optimizer_of(maker: MakeOptimizer, module: nn.Module) -> Optimizer:
    """The optimizer of everything in a module that trains."""
    return _of(maker, [(name, p) for name, p in module.named_parameters() if p.requires_grad])


def _of(maker: MakeOptimizer, named: Sequence[tuple[str, nn.Parameter]]) -> Optimizer:
    return maker(named) if isinstance(maker, Grouped) else maker([each for _, each in named])


def tried(maker: MakeOptimizer, named: Mapping[str, int]) -> Optimizer:
    """An optimizer of tiny parameters that has made a step, to see that it can.

    Args:
        maker: as `Grouped` and torch's optimizers are.
        named: dimensions of each parameter, by its name.

    Raises:
        UserError: it cannot be made, or steps in another way.
    """
    pairs = [(name, nn.Parameter(torch.zeros((1,) * ndim))) for name, ndim in named.items()]
    for _, parameter in pairs:
        parameter.grad = torch.zeros_like(parameter)
    try:
        made = _of(maker, pairs)
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
