"""The LightningModule that wraps any objective around any network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import lightning
import torch
from torch import Tensor, nn

from diffusion_pl.diffusion.objective import TrainingObjective
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.diffusion.random import ImageNoise, generator, own_generator, seed_of
from diffusion_pl.images import from_bytes
from diffusion_pl.training import ema as averaging

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Augment(Protocol):
    """Changes clean images and says how; see data/augment.py."""

    @property
    def draws(self) -> int: ...

    def __call__(self, image: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]: ...


class NonFiniteLoss(RuntimeError):
    """The loss is infinite or not a number; raised before the weights are touched."""


class DiffusionModule(lightning.LightningModule):
    """Trains one denoiser and keeps its moving average beside it.

    `denoiser` is trained, `ema` is its average; both are registered, so a checkpoint holds both
    under their own names and neither is ever swapped for the other. Progress is counted in images.

    Args:
        network: the raw network F.
        objective: what it is trained to do.
        optimizer: makes the optimizer from the parameters.
        ema: how the average forgets.
        batch_size: images of an optimizer step over all devices.
        classes: labels that the network takes, 0 for an unconditional one, which sees none.
        warmup: images over which the learning rate rises linearly from 0.
        label_dropout: probability with which a label is replaced by -1, none.
        augment: changes the images and labels the change for the network, or None.
        seed: of everything random in training.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: TrainingObjective,
        optimizer: MakeOptimizer,
        ema: averaging.EMA,
        *,
        batch_size: int,
        classes: int = 0,
        warmup: int = 0,
        label_dropout: float = 0.0,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must be in [0, 1] (got {label_dropout})")
        self.objective = objective
        self.denoiser: Denoiser = objective.denoiser(network)
        self.ema: Denoiser = averaging.averaged_copy(self.denoiser)
        self.ema_profile = ema
        self.update_ema: averaging.Updates | None = None  # made once the weights are on the device
        self.make_optimizer = optimizer
        self.batch_size = batch_size
        self.classes = classes
        self.warmup = warmup
        self.label_dropout = label_dropout
        self.augment = augment
        self.seed = seed
        # Sum of the loss over the micro-batches since the last reading, and how many they were; on
        # the device, so that no step waits for it.
        self.loss_sum: Tensor | None = None
        self.loss_count = 0

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the name of the hook it calls some forty times a step; torch would each
        # time ask whether it is a parameter, 0.1 ms in all.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def images_seen(self) -> int:
        """Images that have gone into the weights so far, over all devices."""
        return self.global_step * self.batch_size

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer over the denoiser and the objective's own weights, if it has any.

        The rate is set per step by `optimizer_step`.
        """
        trained = (p for p in self.parameters() if p.requires_grad)  # the average does not
        optimizer = self.make_optimizer(trained)
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
        return optimizer

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss over one micro-batch.

        Args:
            batch: "image" uint8 (B, C, H, W), "index" int64 (B,) on the host: position of
                each image in the run; "label" int64 (B,) where the data has classes.
            batch_idx: micro-batches done on this device.

        Raises:
            NonFiniteLoss: names the step and the noise levels.
        """
        hidden = {"image", "index"} if self.classes else {"image", "index", "label"}
        condition = {key: value for key, value in batch.items() if key not in hidden}
        image = from_bytes(batch["image"])
        image, u, noise, condition = self.draw(image, batch["index"], condition)
        loss = self.objective.loss(self.denoiser, image, u, noise, **condition).mean()
        self.refuse_non_finite(loss.detach(), u)
        detached = loss.detach()
        self.loss_sum = detached if self.loss_sum is None else self.loss_sum + detached
        self.loss_count += 1
        return loss

    def draw(
        self, image: Tensor, index: Tensor, condition: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Everything random of a micro-batch, counted from (seed, index).

        Returns:
            image: augmented if so set.
            u: quantiles in (0, 1), float64 (B,), stratified over the global batch: each of its
                batch_size equal intervals holds one.
            noise: standard normal (B, C, H, W).
            condition: with labels dropped, and the label of the augmentation.
        """
        positions = index.tolist()
        step, first = divmod(positions[0], self.batch_size)
        source = generator(self.seed, "levels", step)
        strata = torch.randperm(self.batch_size, generator=source)
        columns = 2 if self.augment is None else 2 + self.augment.draws
        uniform = torch.rand(self.batch_size, columns, generator=source, dtype=torch.float64)
        mine = slice(first, first + len(positions))
        u = (strata[mine] + uniform[mine, 0]) / self.batch_size
        uniform = uniform[mine].to(image.device, non_blocking=True)
        condition = dict(condition)
        if self.label_dropout and "label" in condition:
            dropped = uniform[:, 1] < self.label_dropout
            condition["label"] = condition["label"].masked_fill(dropped, -1)
        if self.augment is not None:
            image, condition["augment"] = self.augment(image, uniform[:, 2:])
        noise = ImageNoise(self.seed, positions, "training", image.device)(image)
        # Dropout inside the network draws from the device's own generator; it restarts per
        # micro-batch. (torch.manual_seed would seed every device there could be: milliseconds.)
        own_generator(image.device).manual_seed(seed_of(self.seed, "dropout", positions[0]))
        return image, u.to(image.device, non_blocking=True), noise, condition

    def refuse_non_finite(self, loss: Tensor, u: Tensor) -> None:
        """Stop before the update when the loss is not finite."""
        if not torch.isfinite(loss):
            levels = ", ".join(f"{level:.4g}" for level in self.objective.schedule(u).tolist())
            raise NonFiniteLoss(
                f"the loss is {loss.item()} at step {self.global_step}, {self.images_seen:,} "
                f"images; noise levels of the batch: {levels}"
            )

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None
    ) -> None:
        """Step at the warmed-up rate, then move the average.

        The rate counts the images seen before the step, so the first step has rate 0 (Karras 2022,
        released code).
        """
        images = self.images_seen
        if images <= self.warmup + self.batch_size:  # beyond it the rate stays as it is
            rise = min(images / self.warmup, 1.0) if self.warmup else 1.0
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rise
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        decay = self.ema_profile.decay(images, self.batch_size)
        if self.update_ema is None:
            self.update_ema = averaging.Updates(self.ema, self.denoiser)
        self.update_ema(decay)

    def read_loss(self) -> float | None:
        """Mean loss since the last reading on this device, None when there was no step."""
        if self.loss_sum is None:
            return None
        mean = float(self.loss_sum) / self.loss_count
        self.loss_sum, self.loss_count = None, 0
        return mean
