"""Strategies: a copy of the model on each device (DDP), or a shard (FSDP)."""

from __future__ import annotations

import inspect
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
from torch.nn.parallel import DistributedDataParallel

from diffusion_pl.config.tree import nearest
from diffusion_pl.errors import UserError
from diffusion_pl.training import meeting, sharding
from diffusion_pl.training.adapter import in_a_line
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.settings import OURS, TrainerConfig


class Slurm(SLURMEnvironment):
    """Lightning's SLURM environment, with a port that no other job uses."""

    @property
    def main_port(self) -> int:
        """Port at which the ranks meet."""
        port = meeting.port_of(os.environ)
        assert port is not None
        os.environ["MASTER_PORT"] = str(port)
        return port


class Copied(DDPStrategy):
    """Lightning's DDP, with a time limit for the ranks to meet."""

    def setup_distributed(self) -> None:
        with _in_time(self):
            super().setup_distributed()


class Sharded(DDPStrategy):
    """Lightning's DDP launcher around a sharded model.

    Checkpoints are those of DDP: read before the model is sharded, and written by rank 0 from
    tensors that are gathered one at a time.
    """

    def setup_distributed(self) -> None:
        with _in_time(self):
            super().setup_distributed()

    def model_to_device(self) -> None:
        """Shard the model; a device holds at most one block whole at a time."""
        module = cast(DiffusionModule, self.lightning_module)
        # The run's own group of processes, so that its time limits hold here.
        group = distributed.group.WORLD
        assert group is not None
        mesh = DeviceMesh.from_group(group, self.root_device.type)
        sharding.shard_trained(module.denoiser, mesh)
        for average in (module.ema, *module.profiles):
            sharding.shard_average(average, mesh)
        module.to(self.root_device)  # what is not sharded

    def configure_ddp(self) -> None:
        """Nothing: FSDP exchanges the gradient."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights and averages, on rank 0."""
        assert self.lightning_module is not None
        return sharding.saved(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole moments, on rank 0."""
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return sharding.saved_optimizer(plain.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this device's shards of a checkpoint's moments."""
        states = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(sharding.shard_optimizer(state, optimizer))

    def teardown(self) -> None:
        """End the run; the model stays on the devices, since an evaluation may follow."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def make_strategy(settings: TrainerConfig) -> Strategy | str:
    """The strategy of a run; "auto" for a single device.

    Raises:
        UserError: an unsupported strategy.
    """
    if settings.strategy not in OURS:
        return _lightnings(settings)
    if settings.world_size() == 1:
        return "auto"
    kind = Sharded if settings.strategy == "fsdp" else Copied
    return kind(timeout=timedelta(seconds=settings.start_timeout))


def _lightnings(settings: TrainerConfig) -> Strategy:
    """A strategy of Lightning's or the user's, by name or built."""
    given: Any = settings.strategy
    if isinstance(given, str):
        known = StrategyRegistry.available_strategies()
        if given not in known:
            raise UserError(f"trainer.strategy: unknown {given!r}{nearest(given, known)}")
        try:
            with in_a_line():
                given = StrategyRegistry.get(given)
        except (TypeError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"trainer.strategy: {given} cannot be made here ({reason})") from error
    name = type(given).__name__
    if not isinstance(given, Strategy):
        raise UserError(f"trainer.strategy: must be one of Lightning's (got a {name})")
    if isinstance(given, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise UserError(
            f"trainer.strategy: {name} shards the weights, which this package's averages, clipping "
            "and checkpoints do not support; use fsdp"
        )
    if getattr(given, "_start_method", "popen") != "popen":
        raise UserError(
            f"trainer.strategy: {name} starts its ranks in the middle of the training; use one "
            "that starts them as processes of their own, such as ddp"
        )
    if isinstance(given, DDPStrategy):  # its further arguments are read when the training starts
        free = set(inspect.signature(DistributedDataParallel).parameters)
        free -= {"module", "device_ids"}  # given by Lightning
        for key in given._ddp_kwargs.keys() - free:
            raise UserError(
                f"trainer.strategy: {name} has no argument {key!r}{nearest(key, sorted(free))}"
            )
    return given


def cluster(settings: TrainerConfig) -> list[ClusterEnvironment]:
    """The cluster environment, by how this process was started.

    Without Lightning's requeue, which would save in the middle of a step: `Stop` and the job's
    script do that.

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
    """Limit the time in which the ranks must meet."""
    cluster, limit = strategy.cluster_environment, strategy._timeout
    assert cluster is not None and limit is not None
    return meeting.time_limit(limit.total_seconds(), f"{cluster.main_address}:{cluster.main_port}")
