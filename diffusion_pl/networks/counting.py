"""A limit on the tensors of a network while it is built from settings of others."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from diffusion_pl.errors import UserError


@contextlib.contextmanager
def at_most(tensors: int | None) -> Iterator[None]:
    """Refuse to build a network of more tensors than there are weights for.

    Args:
        tensors: that it may have; None for any number.

    Raises:
        UserError: it has more.
    """
    made = itertools.count(1)

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if tensors is not None and next(made) > tensors:
            raise UserError(f"has more than the {tensors:,} tensors that the checkpoint holds")

    counting = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        counting.remove()


def spare(tensors: int) -> int:
    """More tensors than a file has, so that a network that is a little too large is named by the
    first of its weights that is missing."""
    return 4 * tensors + 1000
