"""Muon: momentum made orthogonal by Newton-Schulz (Jordan 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon iterates in bfloat16, matrix by matrix, on any machine. A processor that has no
arithmetic of that kind is slower by several times the rest of a step; here the iteration is in
bfloat16 on a GPU and in float32 elsewhere, matrices of one shape are iterated together, and a
matrix that ranks hold in parts is iterated whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffusion_pl.errors import UserError

# X -> a X + (b A + c A A) X with A = X X^T, the published coefficients: five steps take every
# singular value between 0.003 and 1 to between 0.68 and 1.21, which is near enough to 1.
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5
Scale = Literal["shape", "adam"]


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices near 1 and leave their directions.

    Args:
        matrices: (n, rows, columns), rows <= columns, floating.

    Returns:
        The same shape and dtype; zero matrices stay zero.
    """
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


class Muon(Optimizer):
    """Muon for matrices; everything else goes to another optimizer, see `optimizers.Grouped`.

    Args:
        params: of two dimensions, or groups of them.
        lr: learning rate, > 0.
        momentum: in [0, 1).
        nesterov: the gradient is mixed into the momentum once more.
        weight_decay: as AdamW's, >= 0.
        scale: of a step on a matrix (rows, columns): `shape` is sqrt(max(1, rows / columns)), the
            published one; `adam` is 0.2 sqrt(max(rows, columns)), with which a step is as long as
            AdamW's (Liu et al. 2025, arXiv:2502.16982), whose lr then fits.
        flatten: take parameters of more dimensions too, as matrices of their first dimension by
            all others, as Jordan does with the kernels of convolutions.

    Raises:
        UserError: parameters that are no matrices, or numbers out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: Scale = "shape",
        flatten: bool = False,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and 0 <= momentum < 1):
            raise UserError(
                "Muon needs lr and weight_decay of at least 0 and momentum in [0, 1) (got "
                f"{lr}, {weight_decay} and {momentum})"
            )
        if scale not in ("shape", "adam"):
            raise UserError(f"Muon's scale is shape or adam (got {scale!r})")
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov,
            "weight_decay": weight_decay, "scale": scale,
        }  # fmt: skip
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2 and not (flatten and parameter.ndim > 2):
                    shape = tuple(parameter.shape)
                    more = "flatten takes those of more; " if parameter.ndim > 2 else ""
                    raise UserError(f"Muon only supports 2D parameters ({more}got shape {shape})")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = whole(self._momentum(parameter, group)).flatten(1)
                    wide = update if update.shape[0] <= update.shape[1] else update.mT
                    key = (*wide.shape, update.device, update.dtype)
                    alike.setdefault(key, []).append((parameter, wide))
            for pairs in alike.values():
                found = torch.stack([wide for _, wide in pairs])
                found = orthogonal(found.bfloat16() if found.is_cuda else found)
                for (parameter, _), wide in zip(pairs, found, strict=True):
                    rows = parameter.shape[0]
                    columns = parameter.numel() // rows
                    matrix = (wide if rows <= columns else wide.mT).to(parameter.dtype)
                    step = matrix.reshape(parameter.shape)
                    factor = _factor(rows, columns, group["scale"])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(part(step, parameter), alpha=-group["lr"] * factor)
        return loss

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Follow the gradient; what is to be made orthogonal."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"]
        average.lerp_(parameter.grad, 1 - group["momentum"])
        if group["nesterov"]:
            return parameter.grad.lerp(average, group["momentum"])
        return average.clone()


def _factor(rows: int, columns: int, scale: Scale) -> float:
    """What a step on a matrix is multiplied by."""
    if scale == "shape":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def whole(tensor: Tensor) -> Tensor:
    """A tensor that ranks may hold in parts."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """What a rank holds of a tensor that all have whole; the tensor where they share nothing."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate  # 0.7 s, which one device need not wait

    assert isinstance(like, DTensor)
    there = DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim)
    return there.redistribute(placements=like.placements)
