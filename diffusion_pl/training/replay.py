"""Replay a step of a run: train up to it from an earlier checkpoint, then inspect it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.images import from_bytes, to_bytes
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import sameness
from diffusion_pl.training.adapter import CheckpointFiles, precision_plugin, quiet_lightning
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.run import Experiment, make_module
from diffusion_pl.training.run_data import RunData
from diffusion_pl.training.settings import resolve_precision


@dataclass(frozen=True)
class Replayed:
    """A step's images, losses and gradient.

    Args:
        positions: of its B images in the run.
        indices: in the data set.
        files: that they are read from.
        labels: None without classes.
        sigmas: noise levels (B,).
        losses: (B,).
        norms: norm of the gradient of every parameter, by name.
        shown: uint8 (3, B, C, H, W): clean (augmented), noisy and denoised images.
    """

    positions: list[int]
    indices: list[int]
    files: list[str]
    labels: list[int] | None
    sigmas: Tensor
    losses: Tensor
    norms: dict[str, float]
    shown: Tensor


def replay(experiment: Experiment, checkpoint: Path | None, step: int) -> Replayed:
    """Train up to a step on one device, without writing anything, and inspect the step.

    Bit-exact on a CPU for a run of one device; for several, up to rounding.

    Args:
        experiment: the parts, freshly built.
        checkpoint: of the run, after at most `step` steps; None: from the beginning.
        step: number of optimizer steps before it.

    Raises:
        NonFiniteError: in an earlier step.
        UserError: the data differs from the checkpoint's.
    """
    settings = experiment.settings
    batch_size = settings.per_device_batch(experiment.data.batch_size, settings.world_size())
    settings = dataclasses.replace(
        settings, devices=1, nodes=1, device_batch_size=settings.device_batch_size or batch_size
    )
    experiment = dataclasses.replace(experiment, settings=settings)
    data = RunData(experiment.data, settings, experiment.network, experiment.seed)
    if checkpoint is not None:
        _check_data(data, checkpoint)
    with quiet_lightning():
        precision = resolve_precision(settings.precision, settings.device_type())
        trainer = lightning.Trainer(
            accelerator=settings.accelerator,
            devices=1,
            max_steps=step,
            max_epochs=-1,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            log_every_n_steps=2**31,
            plugins=[CheckpointFiles(), precision_plugin(precision, settings)],
        )
        module = make_module(experiment)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        module.to(trainer.strategy.root_device).train()
        with trainer.precision_plugin.forward_context():
            return _inspect(module, data, step)


def _check_data(data: RunData, checkpoint: Path) -> None:
    """Refuse data that differs from the checkpoint's."""
    before = checkpoints.load(checkpoint)[checkpoints.SECTION].get("data")
    data.prepare_data()
    data.setup("fit")
    now = sameness.data_of(data.images)
    if isinstance(before, dict) and (difference := sameness.data_changed(before, now)):
        raise UserError(
            f"{checkpoint}: the training data has changed since ({difference}); restore it to look "
            "at a step again"
        )


def _inspect(module: DiffusionModule, data: RunData, step: int) -> Replayed:
    """Inspect the step that a module would make next."""
    batches = data.train_dataloader()
    batch = data.transfer_batch_to_device(batches[step], module.device, 0)
    positions = batch["index"].tolist()
    module.zero_grad()
    losses = []
    for passed in module.image_losses(batch):
        (passed.sum() / len(positions)).backward()
        losses.append(passed.detach())
    norms = {
        name: float(nn.utils.get_total_norm([parameter.grad]))
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    image, u, noise, condition = module.draw(
        from_bytes(batch["image"]), batch["index"], module.condition(batch)
    )
    sigma = module.objective.schedule(u)
    module.counted.begin(batch["index"], image.device)  # of all micro-batches together
    noisy = image + sigma.to(image)[:, None, None, None] * noise
    with torch.no_grad():
        denoised = module.denoiser(noisy, sigma.to(image), **condition)
    indices = batches.order(positions[0], positions[-1] + 1).tolist()
    images = data.opened()
    return Replayed(
        positions=positions,
        indices=indices,
        files=[images.origin(index) for index in indices],
        labels=None if images.labels is None else images.labels[indices].tolist(),
        sigmas=sigma.cpu(),
        losses=torch.cat(losses).float().cpu(),
        norms=norms,
        shown=torch.stack([to_bytes(shown) for shown in (image, noisy, denoised)]).cpu(),
    )
