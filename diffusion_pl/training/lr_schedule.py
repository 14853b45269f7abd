"""Learning-rate schedules: a factor by images seen, or a scheduler of torch's."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR, ReduceLROnPlateau

from diffusion_pl.errors import UserError

# (images seen before the step, images of the whole training) -> factor of every group's rate; or a
# functools.partial of a torch scheduler that lacks only the optimizer.
LRSchedule = Callable[..., Any]

TRIED = 1000  # steps whose rates are tried before a training starts


@dataclass(frozen=True)
class WarmupDecay:
    """Linear warm-up, inverse-square-root decay and linear cool-down, each optional.

    Constant: Ho 2020. `warmup`: Karras 2022 (released code: the first step has rate 0).
    `decay_from`: Karras 2024, section 2.3.

    Args:
        warmup: images over which the rate rises from 0.
        decay_from: images after which the rate is times (decay_from / images)^(1/2); 0 for never.
        cooldown: images at the end over which the rate falls to 0, 0 for none; it improves short
            runs and makes seeds differ less.
    """

    warmup: int = 0
    decay_from: int = 0
    cooldown: int = 0

    def __post_init__(self) -> None:
        for key in ("warmup", "decay_from", "cooldown"):
            if getattr(self, key) < 0:
                raise UserError(f"{key} must not be negative (got {getattr(self, key)})")

    def __call__(self, images: int, total_images: int) -> float:
        """The factor, in [0, 1], of the step that follows `images` images."""
        rise = images / self.warmup if self.warmup else 1.0
        fall = max((total_images - images) / self.cooldown, 0.0) if self.cooldown else 1.0
        slow = math.sqrt(self.decay_from / max(images, self.decay_from)) if self.decay_from else 1.0
        return min(rise, fall, 1.0) * slow


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine (Loshchilov and Hutter 2017, eq. 5, one period).

    Args:
        warmup: images over which the rate rises from 0.
        final: factor at the end of the training, in [0, 1].
    """

    warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup < 0 or not 0 <= self.final <= 1:
            raise UserError(
                f"warmup must not be negative, final in [0, 1] (got {self.warmup}, {self.final})"
            )

    def __call__(self, images: int, total_images: int) -> float:
        """The factor, in [0, 1], of the step that follows `images` images."""
        if images < self.warmup:
            return images / self.warmup
        done = min((images - self.warmup) / max(total_images - self.warmup, 1), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


def scheduler_of(schedule: LRSchedule, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
    """The torch scheduler that a schedule makes, stepped once a step; None for a factor."""
    return schedule(optimizer) if is_torch_s(schedule) else None


def is_torch_s(schedule: LRSchedule) -> bool:
    """Whether a schedule makes a torch scheduler, which counts steps."""
    made = schedule.func if isinstance(schedule, functools.partial) else None
    return inspect.isclass(made) and issubclass(made, LRScheduler)


def check(
    schedule: LRSchedule, optimizer: torch.optim.Optimizer, steps: int, batch_size: int
) -> None:
    """Check a schedule before a training starts.

    Every step's rate is tried; in a longer training those of some `TRIED` steps, evenly spaced for
    a factor and the first ones for a scheduler of torch's, which has to make them one by one.

    Args:
        schedule: built.
        optimizer: a trial optimizer, which is changed.
        steps: of the training.
        batch_size: images of each step.

    Raises:
        UserError: it takes other arguments, fails, ends before the training, or gives a rate that
            is negative or not finite.
    """
    if is_torch_s(schedule):
        _check_torch_s(schedule, optimizer, steps)
        return
    total_images = steps * batch_size
    try:
        inspect.signature(schedule).bind(0, total_images)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"is called with (images, total_images) and takes others ({error}); torch's schedulers "
            "are handed on with `_partial_: true`"
        ) from error
    for step in sorted({*range(0, steps, math.ceil(steps / TRIED)), steps - 1}):
        images = step * batch_size
        # Of settings that do not fit; a bug in a schedule of the user's keeps its traceback.
        kinds = (ValueError, ArithmeticError, TypeError)
        with _in_a_line(f"fails at {images:,} of {total_images:,} images", kinds):
            factor = schedule(images, total_images)
        if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            got = " ".join(repr(factor).split())
            raise UserError(f"must give a factor from 0 on (got {got} at {images:,} images)")


def _check_torch_s(schedule: LRSchedule, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Check a torch scheduler by making its first steps."""
    kind = schedule.func  # type: ignore[attr-defined]
    if issubclass(kind, ReduceLROnPlateau):
        raise UserError("ReduceLROnPlateau waits for a measured number, which steps have not")
    fails = f"{kind.__name__} fails with these settings; correct them"
    with _in_a_line(fails):
        scheduler = schedule(optimizer)
        optimizer.step()
    if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < steps:
        raise UserError(
            f"{kind.__name__} ends after {scheduler.total_steps:,} of the training's {steps:,} "
            f"steps; set total_steps to {steps}"
        )
    for each in scheduler.milestones if isinstance(scheduler, MultiStepLR) else ():
        if not isinstance(each, int | float) or each % 1:
            raise UserError(f"milestones must be whole numbers of steps (got {each!r})")
    for step in range(min(steps, TRIED)):
        for group in optimizer.param_groups:
            if not 0 <= (rate := float(group["lr"])) < math.inf:
                raise UserError(
                    f"{kind.__name__} must give rates from 0 on (got {rate:g} at step {step:,})"
                )
        with _in_a_line(fails):
            scheduler.step()


@contextlib.contextmanager
def _in_a_line(what: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turn what a schedule raises into a `UserError` of one line."""
    try:
        yield
    except kinds as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what} ({type(error).__name__}: {reason})") from error
