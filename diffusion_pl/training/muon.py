"""Muon: momentum made orthogonal by Newton-Schulz (Jordan 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon iterates in bfloat16, matrix by matrix, on any machine. Here a GPU iterates in
bfloat16, matrices of one shape together. A CPU iterates in float32 on the small matrices X X^T
alone, those of one number of rows together, which gives the same in a third of the time: every
step multiplies X from the left by a polynomial P of A = X X^T, so that P_5 ... P_1 X_0 needs X
twice, and A becomes P A P. (In bfloat16 that would lose what X X^T squares.) A matrix that ranks
hold in parts is iterated whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def orthogonal_by_gram(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The same of matrices with one number of rows, each with columns of its own, by A = X X^T.

    Args:
        matrices: (rows, columns) each, rows <= columns, float32 or float64.
    """
    gram = torch.stack([x @ x.mT for x in matrices])
    norm = gram.diagonal(dim1=1, dim2=2).sum(dim=1).sqrt()[:, None, None] + 1e-7
    gram = gram / norm.square()
    whole_p = 1 / norm * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    for step in range(STEPS):
        p = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        p.diagonal(dim1=1, dim2=2).add_(A)
        whole_p = p @ whole_p
        if step < STEPS - 1:
            gram = p @ gram @ p
    return [p @ x for p, x in zip(whole_p, matrices, strict=True)]


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
                    shape = wide.shape if wide.is_cuda else wide.shape[:1]
                    key = (*shape, update.device, update.dtype)
                    alike.setdefault(key, []).append((parameter, wide))
            for pairs in alike.values():
                found = _orthogonal([wide for _, wide in pairs])
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


def _orthogonal(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    # A step may lie within autocast, which would make bfloat16 of float32.
    with torch.autocast(matrices[0].device.type, enabled=False):
        if matrices[0].is_cuda:
            return orthogonal(torch.stack([*matrices]).bfloat16()).unbind()
        return orthogonal_by_gram(matrices)


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
