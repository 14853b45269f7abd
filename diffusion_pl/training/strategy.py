"""How the devices of a run share the work: a copy of the model each (DDP), or a part (FSDP)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from diffusion_pl.config.tree import nearest
from diffusion_pl.errors import UserError
from diffusion_pl.training import meeting, sharding
from diffusion_pl.training.adapter import in_a_line
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.settings import OURS, TrainerConfig


class Slurm(SLURMEnvironment):
    """Lightning's way to find the tasks of a job step, at a port that jobs do not share."""

    @property
    def main_port(self) -> int:
        """Where the ranks meet."""
        port = meeting.port_of(os.environ)
        assert port is not None
        os.environ["MASTER_PORT"] = str(port)
        return port


class Copied(DDPStrategy):
    """A copy of the model on every device, as Lightning has it; the ranks meet in time or end."""

    def setup_distributed(self) -> None:
        """Meet the other ranks."""
        with _in_time(self):
            super().setup_distributed()


class Sharded(DDPStrategy):
    """Lightning's way to start ranks, around a model that is spread over them.

    A checkpoint is the one that DDP writes: it is read before the model is spread, and written by
    the first rank from tensors that are gathered one at a time.
    """

    def setup_distributed(self) -> None:
        """Meet the other ranks."""
        with _in_time(self):
            super().setup_distributed()

    def model_to_device(self) -> None:
        """Spread the model; nothing lies whole on a device but one block at a time."""
        module = cast(DiffusionModule, self.lightning_module)
        # The run's own group of processes, so that its time limits hold here.
        group = distributed.group.WORLD
        assert group is not None
        mesh = DeviceMesh.from_group(group, self.root_device.type)
        sharding.shard_trained(module.denoiser, mesh)
        for average in (module.ema, *module.profiles):
            sharding.shard_average(average, mesh)
        module.to(self.root_device)  # what is not spread

    def configure_ddp(self) -> None:
        """Nothing: the model exchanges its gradient itself."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights and averages whole, on the first rank."""
        assert self.lightning_module is not None
        return sharding.saved(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The moments whole, on the first rank."""
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return sharding.saved_optimizer(plain.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this device's part of the moments of a checkpoint."""
        states = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(sharding.shard_optimizer(state, optimizer))

    def teardown(self) -> None:
        """End the run; the model stays where it is spread, since an evaluation may follow."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def make_strategy(settings: TrainerConfig) -> Strategy | str:
    """What a run's devices do together; one alone has nothing to share.

    Raises:
        UserError: a strategy that this training cannot follow.
    """
    if settings.strategy not in OURS:
        return _lightnings(settings)
    if settings.nodes * settings.devices_per_node() == 1:
        return "auto"
    kind = Sharded if settings.strategy == "fsdp" else Copied
    return kind(timeout=timedelta(seconds=settings.start_timeout))


def _lightnings(settings: TrainerConfig) -> Strategy:
    """A strategy of Lightning's or the user's own, by its name or made."""
    given: Any = settings.strategy
    if isinstance(given, str):
        known = StrategyRegistry.available_strategies()
        if given not in known:
            raise UserError(f"trainer.strategy: unknown {given!r}{nearest(given, known)}")
        with in_a_line():
            given = StrategyRegistry.get(given)
    name = type(given).__name__
    if not isinstance(given, Strategy):
        raise UserError(f"trainer.strategy: must be one of Lightning's (got a {name})")
    if isinstance(given, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise UserError(
            f"trainer.strategy: {name} spreads the weights in a way that their average, clipping "
            "and checkpoints do not follow; take fsdp, this package's own"
        )
    if getattr(given, "_start_method", "popen") != "popen":
        raise UserError(
            f"trainer.strategy: {name} starts its ranks in the middle of the training; take one "
            "that starts them as processes of their own, such as ddp"
        )
    return given


def cluster(settings: TrainerConfig) -> list[ClusterEnvironment]:
    """How the ranks find one another, by who started this one; without Lightning's requeue.

    Told by a signal, that saves in the middle of a step; stops are `Stop`'s, jobs their script's.

    Raises:
        UserError: as `meeting.starter`.
    """
    by = meeting.starter(os.environ, settings.nodes, settings.devices_per_node())
    if by == "srun":
        return [Slurm(auto_requeue=False)]
    if by == "another":  # that Lightning knows
        return []
    return [TorchElasticEnvironment() if by == "torchrun" else LightningEnvironment()]


def _in_time(strategy: DDPStrategy) -> AbstractContextManager[None]:
    """Bound how long the ranks may take to meet."""
    cluster, limit = strategy.cluster_environment, strategy._timeout
    assert cluster is not None and limit is not None
    return meeting.time_limit(limit.total_seconds(), f"{cluster.main_address}:{cluster.main_port}")
