"""What each of several processes finds when a model is spread over them; see test_sharding.py."""

from __future__ import annotations

import copy

import started
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.networks.uvit import UViT
from diffusion_pl.training import sharding
from diffusion_pl.training.ema import Updates, averaged_copy


def found(ranks):
    """What every rank finds, in the order of the ranks."""
    return started.answers(_find, ranks)


def network():
    """A U-ViT of which some tensors have fewer rows than there are ranks."""
    torch.manual_seed(0)
    made = UViT(8, model_channels=8, channel_mult=(1, 2), blocks=(1,), transformers=2, heads=2,
                dropout=0.0, embedding_channels=16, activation_checkpointing=True)  # fmt: skip
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)  # none starts at zero
    return made.to(memory_format=torch.channels_last)


def _find(rank, ranks):
    plain = Denoiser(network(), Karras())
    plain_average = averaged_copy(plain)
    trained, average = copy.deepcopy(plain), copy.deepcopy(plain_average)
    mesh = DeviceMesh.from_group(distributed.group.WORLD, "cpu")
    sharding.shard_trained(trained, mesh)
    sharding.shard_average(average, mesh)
    told = {
        "whole": sum(p.numel() for p in plain.parameters()),
        "trained": sum(sharding.part(p).numel() for p in trained.parameters()),
        "average": sum(sharding.part(p).numel() for p in average.parameters()),
        "bytes": sum(sharding.part(p).untyped_storage().nbytes()
                     for p in (*trained.parameters(), *average.parameters())),
        "units": sum(isinstance(module, FSDPModule) for module in trained.modules()),
        "empty": sum(sharding.part(p).numel() == 0 for p in trained.parameters()),
    }  # fmt: skip

    # A step of two passes of one image a rank, and the same on one process.
    x, sigma = torch.randn(2 * ranks, 3, 8, 8), torch.full((2 * ranks,), 0.7)
    plain(x, sigma).square().sum().div(2 * ranks).backward()
    one, two = (slice(rank + ranks * number, rank + ranks * number + 1) for number in (0, 1))
    with sharding.unsynchronised(trained):
        trained(x[one], sigma[one]).square().sum().div(2).backward()
    told["exchanged early"] = any(p.grad is not None for p in trained.parameters())
    trained(x[two], sigma[two]).square().sum().div(2).backward()
    told["gradient"] = _farthest((p.grad for p in trained.parameters()),
                                 (p.grad for p in plain.parameters()))  # fmt: skip
    norm = sharding.total_norm([p.grad for p in trained.parameters()])
    wanted = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    told["norm"] = float((norm / wanted - 1).abs())
    told["plain norm"] = not isinstance(norm, DTensor)

    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1, eps=0.1, fused=True)
                  for m in (trained, plain)]  # fmt: skip
    for optimizer in optimizers:
        optimizer.step()
    Updates(average, trained, sharding.part)(0.75)
    Updates(plain_average, plain)(0.75)
    told["weights"] = _farthest(trained.parameters(), plain.parameters())
    told["averaged"] = _farthest(average.parameters(), plain_average.parameters())

    state = [sharding.saved_optimizer(optimizers[0].state_dict())]
    saved = sharding.saved(average.state_dict())
    told["saved"], told["kind"] = (len(state[0]), len(saved)), type(saved).__name__
    distributed.broadcast_object_list(state)
    fresh = torch.optim.Adam(trained.parameters(), lr=0.1, eps=0.1, fused=True)
    fresh.load_state_dict(sharding.shard_optimizer(state[0], fresh))
    told["moments"] = all(
        torch.equal(sharding.part(value), sharding.part(fresh.state[p][name]))
        for p in trained.parameters()
        for name, value in optimizers[0].state[p].items()
    )
    plain_state = optimizers[1].state_dict()["state"]
    told["laid out"] = all(
        value.stride() == state[0]["state"][number][name].stride()
        for number, own in plain_state.items()
        for name, value in own.items()
    )

    # One rank alone computes: what is whole needs no other.
    before = list(average.parameters())
    with sharding.assembled(average), torch.inference_mode():
        told["assembled"] = not any(isinstance(p, DTensor) for p in average.parameters())
        if rank == 0:
            difference = (average(x, sigma) - plain_average(x, sigma)).abs().max()
            told["drawn"] = float(difference / plain_average(x, sigma).abs().max())
    told["let go"] = all(p is q for p, q in zip(average.parameters(), before, strict=True))
    return told


def _farthest(spread, plain):
    """The largest difference of two sequences of tensors, of which one is spread."""
    return max(
        float((sharding.gather(one.detach()) - other.detach()).abs().max())
        for one, other in zip(spread, plain, strict=True)
    )
