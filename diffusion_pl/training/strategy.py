"""How the devices of a run share the work: a copy of the model each (DDP), or a part (FSDP)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from diffusion_pl.training import sharding
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.settings import Settings


class Sharded(DDPStrategy):
    """Lightning's way to start ranks, around a model that is spread over them.

    A checkpoint is the one that DDP writes: it is read before the model is spread, and written by
    the first rank from tensors that are gathered one at a time.
    """

    def model_to_device(self) -> None:
        """Spread the model; nothing lies whole on a device but one block at a time."""
        module = cast(DiffusionModule, self.lightning_module)
        # The run's own group of processes, so that its time limits hold here.
        group = distributed.group.WORLD
        assert group is not None
        mesh = DeviceMesh.from_group(group, self.root_device.type)
        sharding.spread_trained(module.denoiser, mesh)
        for average in (module.ema, *module.profiles):
            sharding.spread_average(average, mesh)
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
            optimizer.load_state_dict(sharding.spread_optimizer(state, optimizer))

    def teardown(self) -> None:
        """End the run; the model stays where it is spread, since an evaluation may follow."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def make_strategy(settings: Settings) -> Strategy | str:
    """What a run's devices do together; one alone has nothing to share."""
    if settings.nodes * settings.devices_a_node() == 1:
        return "auto"
    kind = Sharded if settings.strategy == "fsdp" else DDPStrategy
    return kind(timeout=timedelta(seconds=settings.start_timeout))
