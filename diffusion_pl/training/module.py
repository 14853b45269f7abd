"""The LightningModule that wraps any objective around any network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from diffusion_pl.data.draws import uniforms
from diffusion_pl.data.loader import Degradation, remains
from diffusion_pl.diffusion import conditions
from diffusion_pl.diffusion.objective import (
    RemembersSteps,
    Reports,
    TrainingObjective,
    needing_network,
)
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.diffusion.random import ImageNoise, generator, own_generator
from diffusion_pl.errors import UserError
from diffusion_pl.images import from_bytes
from diffusion_pl.seeds import seed_of
from diffusion_pl.training import ema as averaging
from diffusion_pl.training import lr_schedule as schedules
from diffusion_pl.training import power_ema, sharding
from diffusion_pl.training.adapter import QuickModule
from diffusion_pl.training.counted import CountedRandomness
from diffusion_pl.training.optimizers import MakeOptimizer, optimizer_of
from diffusion_pl.training.run_data import RunData
from diffusion_pl.training.sanity import Place
from diffusion_pl.training.settings import TrainerConfig
from diffusion_pl.training.totals import Totals

ROUNDING = 0.05  # of token states, of order 1, between machines


class Augment(Protocol):
    """Augments clean images and returns the parameters used; see data/augment.py."""

    @property
    def draws(self) -> int: ...

    def __call__(self, image: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]: ...


class DiffusionModule(QuickModule):
    """Trains a denoiser and keeps its moving average.

    `denoiser` is trained, `ema` is its average; a checkpoint holds both under these names, and they
    are never swapped. Progress is counted in images.

    A batch is a device's part of one optimizer step, whatever its resolution; `training_step`
    cuts it into micro-batches, accumulates and steps, so a run only ever stops between two steps.

    Args:
        network: the raw network F.
        objective: training objective.
        optimizer: makes the optimizer from the parameters.
        ema: half-life of the average.
        settings: budget, gradient clipping, dropout of conditions, size of a micro-batch.
        batch_size: images of an optimizer step over all devices.
        resolution: side of a full-resolution image, pixels.
        augment: augmentation, whose parameters condition the network, or None.
        degradation: what a network that takes images is given of each, or None.
        lr_schedule: factor of the learning rate by images seen, or a torch scheduler.
        seed: of all random numbers in training.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: TrainingObjective,
        optimizer: MakeOptimizer,
        ema: averaging.EMA,
        settings: TrainerConfig,
        *,
        batch_size: int,
        resolution: int,
        augment: Augment | None = None,
        degradation: Degradation | None = None,
        lr_schedule: schedules.LRSchedule | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Lightning accumulates a fixed number of batches; ours depends on the resolution.
        self.automatic_optimization = False
        self.objective = objective
        self.denoiser: Denoiser = objective.denoiser(network)
        self.ema: Denoiser = averaging.averaged_copy(self.denoiser)
        self.ema_profile = ema
        # Averages of two fixed lengths, from which others are made afterwards.
        lengths = power_ema.LENGTHS if ema.posthoc_every else ()
        self.gammas = [power_ema.gamma_of(length) for length in lengths]
        self.profiles = nn.ModuleList(averaging.averaged_copy(self.denoiser) for _ in lengths)
        # After the copies, which it must not reach.
        for part in needing_network(objective):
            part.attach(network, resolution)
            part.load()
        # Created once the weights are on the device.
        self.updates: list[averaging.Updates] = []
        self.make_optimizer = optimizer
        self.settings = settings
        self.batch_size = batch_size
        self.resolution = resolution
        self.augment = augment
        self.degradation = degradation
        self.lr_schedule = lr_schedule or schedules.WarmupDecay()
        self.seed = seed
        self.totals = Totals()
        self.learning_rate = 0.0  # of the first group, in the newest step
        self.place: Place | None = None  # of the step that is being made
        self.counted = CountedRandomness(self.denoiser.network, seed)
        parts = [*self.denoiser.modules()]
        parts += objective.modules() if isinstance(objective, nn.Module) else ()
        self.memories = [part for part in parts if isinstance(part, RemembersSteps)]
        self.reporting = [part for part in parts if isinstance(part, Reports)]

    def setup(self, stage: str) -> None:
        """Give the networks the data's encoding of "", their null.

        Raises:
            UserError: weights to start from that have another null.
        """
        if not conditions.sizes(self.denoiser.network)["text"]:
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, RunData):
            texts = data.opened().texts
            assert texts is not None  # its opening saw to it
            null, mask = texts.null
            own: Any = self.denoiser.network
            same = torch.equal(own.null_text_mask.cpu(), mask) and torch.allclose(
                own.null_text.cpu(), null.float(), atol=ROUNDING
            )
            if own.null_text_known and not same:
                raise UserError(
                    "the weights to start from were trained with captions of another encoder; "
                    "encode the data's captions with that one"
                )
            for each in (self.denoiser, self.ema, *self.profiles):
                cast(Any, each).network.set_null_text(null, mask)

    @property
    def images_seen(self) -> int:
        """Images trained on so far, over all devices."""
        return self.global_step * self.batch_size

    def configure_optimizers(self) -> Any:
        """One optimizer over the weights of the denoiser and of the objective, if it has any."""
        optimizer = optimizer_of(self.make_optimizer, self)  # the average does not train
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
        scheduler = schedules.scheduler_of(self.lr_schedule, optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """One optimizer step: accumulate the gradient, clip it, update weights and averages.

        Args:
            batch: this device's part of the step; see `image_losses`.
            batch_idx: ignored.

        Returns:
            `loss`, of this device's images, (); what a callback's `on_train_batch_end` gets.

        Raises:
            NonFiniteError: names the step, its images and their noise levels.
        """
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        optimizer.zero_grad()
        micro_batches = self.micro_batches(batch["image"])
        total: Tensor | None = None
        for memory in self.memories:
            memory.begin_step()
        for number, loss in enumerate(self.losses(batch)):
            # Devices exchange the gradient once, with the last micro-batch.
            with self.unsynchronised() if number < micro_batches - 1 else contextlib.nullcontext():
                self.manual_backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
        for memory in self.memories:
            memory.end_step()
        images = self.images_seen
        scheduler = cast(LRScheduler | None, self.lr_schedulers())
        if scheduler is None:
            self.set_rate(optimizer, images)
        self.learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        self.average(images)
        assert total is not None
        self.totals.add(loss=total)
        for part in self.reporting:
            sums = part.report()
            self.totals.add(**{name: each / len(batch["image"]) for name, each in sums.items()})
        self.totals.steps += 1
        return {"loss": total}

    def average(self, images: int) -> None:
        """Update the averages after a step that began at `images` seen."""
        if not self.updates:
            averages = [self.ema, *self.profiles]
            self.updates = [
                averaging.Updates(module, self.denoiser, sharding.part) for module in averages
            ]
        decays = [self.ema_profile.decay(images, self.batch_size)]
        step = images // self.batch_size + 1
        decays += [power_ema.decay(gamma, step) for gamma in self.gammas]
        for update, decay in zip(self.updates, decays, strict=True):
            update(decay)

    def micro_batches(self, image: Tensor) -> int:
        """Micro-batches of a device's batch, images (B, C, H, W)."""
        fraction = image.shape[2] * image.shape[3] / self.resolution**2
        return self.settings.micro_batches(len(image), fraction)

    def losses(self, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The loss of each micro-batch over the device's batch size: they add up to the mean.

        Raises:
            NonFiniteError: names the step, its images and their noise levels.
        """
        for passed in self.image_losses(batch):
            loss = passed.sum() / len(batch["image"])
            self.refuse_non_finite("loss", loss.detach())
            yield loss

    def image_losses(self, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The loss of each image (n,), a micro-batch at a time.

        Args:
            batch: "image" uint8 (B, C, H, W); "index" int64 (B,) on the host, the images'
                positions in the run; conditions, of which the network gets those that it takes.
        """
        condition = self.condition(batch)
        image = from_bytes(batch["image"])
        image, u, noise, condition = self.draw(image, batch["index"], condition)
        positions, count = batch["index"].tolist(), self.micro_batches(image)
        self.place = Place(self.global_step, self.images_seen, image.shape[-1], positions, u)
        for number in range(count):
            part = slice(len(image) * number // count, len(image) * (number + 1) // count)
            self.counted.begin(batch["index"][part], image.device)
            # What else a network may draw comes from the device's own generator, seeded anew for
            # each micro-batch. (torch.manual_seed would seed every device: milliseconds.)
            dropout = seed_of(self.seed, "dropout", positions[part.start])
            own_generator(image.device).manual_seed(dropout)
            conditions = {key: value[part] for key, value in condition.items()}
            yield self.objective.loss(
                self.denoiser, image[part], u[part], noise[part], **conditions
            )

    def condition(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The conditions of a batch that the network takes."""
        given = {key: value for key, value in batch.items() if key not in ("image", "index")}
        return conditions.received(self.denoiser.network, given)

    def unsynchronised(self) -> contextlib.AbstractContextManager[None]:
        """Context in which a backward pass does not exchange gradients."""
        model = self.trainer.strategy.model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model.no_sync()
        return sharding.unsynchronised(self.denoiser)

    def draw(
        self, image: Tensor, index: Tensor, condition: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """All random numbers of a device's batch, counted from (seed, index).

        Returns:
            image: augmented, if there is an augmentation.
            u: quantiles in (0, 1), float64 (B,), stratified over the global batch: one in each of
                batch_size equal intervals.
            noise: standard normal (B, C, H, W).
            condition: with dropout of each kind, the augmentation's parameters, and what is
                given of the augmented images.
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
        if self.augment is not None:
            image, condition["augment"] = self.augment(image, uniform[:, 2:])
        if self.degradation is not None:
            condition |= self.given(image, index)
        for kind, share in self.settings.dropout.items():
            # The label's numbers are older than other kinds', which have a stream each.
            own = kind != "label"
            drawn = uniforms(self.seed, f"{kind} dropout", index) if own else uniform[:, 1]
            condition = conditions.without(condition, [kind], drawn.to(image.device) < share)
        noise = ImageNoise(self.seed, positions, "training", image.device)(image)
        return image, u.to(image.device, non_blocking=True), noise, condition

    def refuse_non_finite(self, what: str, value: Tensor) -> None:
        """Raise before the update if a value of the step is not finite."""
        if not torch.isfinite(value):
            assert self.place is not None
            raise self.place.complaint(what, value.item(), self.objective.schedule)

    def given(self, image: Tensor, index: Tensor) -> dict[str, Tensor]:
        """What a network that takes images is given of these; {} for another network.

        Args:
            image: clean, float32 (B, C, H, W) in [-1, 1].
            index: int64 (B,) on the host, their positions in the run.
        """
        degradation = self.degradation
        if degradation is None or not conditions.sizes(self.denoiser.network)["image"]:
            return {}
        return remains(degradation, image, lambda stream: uniforms(self.seed, stream, index))

    def set_rate(self, optimizer: torch.optim.Optimizer, images: int) -> None:
        """Set the learning rate of the step after `images` seen."""
        rate = self.lr_schedule(images, self.settings.rounded_images(self.batch_size))
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Compute the gradient's norm, refuse a non-finite one, and clip the gradient."""
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm = sharding.total_norm([p.grad for p in trained if p.grad is not None])
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None:
            self.refuse_non_finite("gradient's norm", norm)
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            # fp16: such an optimizer unscales in its step, which it skips if not finite.
            norm = norm / scaler.get_scale()
        self.totals.add(gradient_norm=norm.nan_to_num(posinf=0.0))  # inf: the step is skipped
        if self.settings.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(trained, self.settings.grad_clip, norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the sums for the next row of the log."""
        checkpoint["totals"] = self.totals.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the sums for the next row of the log; refuse another null of the text.

        Raises:
            UserError: the data's encoding of "" is not the one that the run was trained with.
        """
        own = self.state_dict()
        for key in ("denoiser.network.null_text", "denoiser.network.null_text_mask"):
            then = checkpoint["state_dict"].get(key)
            if key in own and then is not None and not torch.equal(own[key].cpu(), then.cpu()):
                raise UserError(
                    "the data encodes the empty caption otherwise than the run was trained with; "
                    "encode its captions with the run's encoder and length"
                )
        if "totals" in checkpoint:  # not in early checkpoints
            self.totals.restore(checkpoint["totals"])
