"""A model spread over the devices: each holds its part of every tensor (FSDP, Zhao et al. 2023).

A tensor is cut along its first dimension, as torch.chunk cuts. What trains is gathered a block at a
time while the block computes. An average never computes while it trains: its parts move after the
parts of the weights, without a message, and it is gathered whole to draw images. Tensors that are
not spread pass through every function as they are.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from diffusion_pl import ranks
from diffusion_pl.diffusion.preconditioning import Denoiser


def shard_trained(denoiser: Denoiser, mesh: DeviceMesh) -> None:
    """Spread a denoiser that trains; its parts lie on the mesh's devices from then on.

    Every block of the network's lists is gathered and let go alone, what is left with the whole.

    Args:
        denoiser: the same on every rank.
        mesh: of one dimension, all ranks.
    """
    denoiser.to(memory_format=torch.contiguous_format)
    for unit in reversed(units(denoiser)):  # inner ones before those that hold them
        fully_shard(unit, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)
    # With weights as they lie now the layers would not choose their faster order of memory.
    denoiser.network.register_forward_pre_hook(_channels_last)


def units(module: nn.Module) -> list[nn.Module]:
    """The blocks in the lists of a network that have parameters, those that hold others first."""
    lists = [inner for inner in module.modules() if isinstance(inner, nn.ModuleList)]
    return [
        block
        for blocks in lists
        for block in blocks
        if not isinstance(block, nn.ModuleList) and any(True for _ in block.parameters())
    ]


def _channels_last(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])


def shard_average(average: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a module that does not train as `shard_trained` spreads its like."""
    for owner, name, parameter in _owned(average):
        setattr(owner, name, nn.Parameter(shard(parameter.detach(), mesh), requires_grad=False))


def _owned(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Every parameter with the module and the name that it lies under."""
    return [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
    ]


def shard(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """This device's part of a tensor that every rank holds whole, a copy on the device."""
    pieces = tensor.detach().contiguous().chunk(mesh.size())
    mine = mesh.get_local_rank()
    piece = pieces[mine] if mine < len(pieces) else tensor.detach()[:0]
    return DTensor.from_local(
        piece.to(mesh.device_type, copy=True, memory_format=torch.contiguous_format),
        mesh,
        [Shard(0)],
        run_check=False,
        shape=tensor.shape,
        stride=torch.empty(tensor.shape, device="meta").stride(),
    )


def part(tensor: Tensor) -> Tensor:
    """This device's part, in place; the tensor itself where it is not spread."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor) -> Tensor:
    """A tensor whole, as it lies on one device that trains alone; every rank calls it."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        whole: Tensor = tensor.full_tensor()
    if whole.dim() != 4:
        return whole
    # A convolution's weight lies as its images do; in name, too, where all orders are the same.
    return torch.empty_like(whole, memory_format=torch.channels_last).copy_(whole)


def saved(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors whole, for a file that the first rank writes; every rank calls it.

    Returns:
        On the first rank spread tensors whole on the CPU and all else as it is; on others, which
        hold one tensor at a time, nothing.
    """
    kept: Any = copy.copy(tensors)  # of the same kind, with what torch notes beside its entries
    for name, value in tensors.items():
        whole = gather(value).cpu() if isinstance(value, DTensor) else value
        if ranks.rank() == 0:
            kept[name] = whole
        else:
            del kept[name]
    return kept


def saved_optimizer(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state as one device would hold it, as `saved` does; every rank calls it.

    Args:
        state: of torch's `state_dict`, by the number of the parameter.
    """
    whole = {number: saved(tensors) for number, tensors in state["state"].items()}
    return {**state, "state": whole} if ranks.rank() == 0 else {}


def shard_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This device's part of an optimizer's state that `saved_optimizer` made.

    Args:
        state: whole, on every rank.
        optimizer: whose parameters are spread.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    mine: dict[int, dict[str, Any]] = {}
    for number, parameter in zip(numbers, trained, strict=True):
        mine[number] = {
            name: shard(value, parameter.device_mesh)
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for name, value in state["state"].get(number, {}).items()
        }
    return {**state, "state": {number: own for number, own in mine.items() if own}}


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of a gradient, all tensors and all their parts; every rank calls it."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextlib.contextmanager
def unsynchronised(denoiser: nn.Module) -> Iterator[None]:
    """Within it a backward pass adds to a whole gradient on this device alone."""
    if not isinstance(denoiser, FSDPModule):
        yield
        return
    denoiser.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        denoiser.set_requires_gradient_sync(True)


@contextlib.contextmanager
def assembled(average: nn.Module) -> Iterator[None]:
    """Within it an average lies whole on every device and computes alone; every rank enters it."""
    owned = [own for own in _owned(average) if isinstance(own[2], DTensor)]
    for owner, name, parameter in owned:
        setattr(owner, name, nn.Parameter(gather(parameter), requires_grad=False))
    try:
        yield
    finally:
        for owner, name, parameter in owned:
            setattr(owner, name, parameter)
