"""A model sharded over devices: each holds a shard of every tensor (FSDP, Zhao et al. 2023).

Tensors are split along their first dimension, as by torch.chunk. Trained weights are gathered a
block at a time while the block computes. Averages are updated shard by shard, without
communication, and gathered whole for sampling. Every function leaves unsharded tensors alone.
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
    """Shard a trained denoiser in place, each block of the network's lists as a unit of its own.

    Args:
        denoiser: the same on every rank.
        mesh: one-dimensional, all ranks.
    """
    denoiser.to(memory_format=torch.contiguous_format)
    for unit in reversed(units(denoiser)):  # inner ones before those that hold them
        fully_shard(unit, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)
    # Sharding makes weights contiguous, so layers would not choose channels_last by themselves.
    denoiser.network.register_forward_pre_hook(_channels_last)


def units(module: nn.Module) -> list[nn.Module]:
    """The blocks with parameters in a network's module lists, outer ones first."""
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
    """Shard a module that does not train, as `shard_trained` does."""
    for owner, name, parameter in _owned(average):
        setattr(owner, name, nn.Parameter(shard(parameter.detach(), mesh), requires_grad=False))


def _owned(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Every parameter with its module and name."""
    return [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
    ]


def shard(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """Shard a tensor that every rank holds whole; a copy on the device."""
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
    """This device's shard, in place; the tensor itself if not sharded."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor) -> Tensor:
    """A whole tensor, laid out as on a single device; every rank calls it."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        whole: Tensor = tensor.full_tensor()
    if whole.dim() != 4:
        return whole
    # Convolution weights are channels_last, also where both memory formats coincide.
    return torch.empty_like(whole, memory_format=torch.channels_last).copy_(whole)


def saved(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors for a file that rank 0 writes; every rank calls it.

    Returns:
        On rank 0 sharded tensors whole on the CPU, others unchanged; on other ranks nothing.
    """
    kept: Any = copy.copy(tensors)  # with torch's `_metadata`
    for name, value in tensors.items():
        whole = gather(value).cpu() if isinstance(value, DTensor) else value
        if ranks.rank() == 0:
            kept[name] = whole
        else:
            del kept[name]
    return kept


def saved_optimizer(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with whole tensors, on rank 0; every rank calls it."""
    whole = {number: saved(tensors) for number, tensors in state["state"].items()}
    return {**state, "state": whole} if ranks.rank() == 0 else {}


def shard_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This device's shards of an optimizer's state from `saved_optimizer`.

    Args:
        state: whole, on every rank.
        optimizer: of sharded parameters.
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
    """The global norm of a gradient; every rank calls it."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextlib.contextmanager
def unsynchronised(denoiser: nn.Module) -> Iterator[None]:
    """Context in which a backward pass does not exchange gradients."""
    if not isinstance(denoiser, FSDPModule):
        yield
        return
    denoiser.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        denoiser.set_requires_gradient_sync(True)


def shard_again(denoiser: nn.Module) -> None:
    """Give up the whole weights that a forward pass without a backward pass has left."""
    for module in denoiser.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def assembled(average: nn.Module) -> Iterator[None]:
    """Context in which an average is whole on every device; every rank enters it."""
    owned = [own for own in _owned(average) if isinstance(own[2], DTensor)]
    for owner, name, parameter in owned:
        setattr(owner, name, nn.Parameter(gather(parameter), requires_grad=False))
    try:
        yield
    finally:
        for owner, name, parameter in owned:
            setattr(owner, name, parameter)
