"""One training run: from built parts to a finished run folder, or on from where it stopped."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import lightning
import torch
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn

from diffusion_pl.data.loader import Loader, MicroBatches, Share
from diffusion_pl.data.order import Order
from diffusion_pl.data.source import Images, Source
from diffusion_pl.diffusion.objective import Objective
from diffusion_pl.evaluation import Evaluation, Sampler, reference_of
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.callbacks import Checkpoints, Evaluate, Log
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.history import History
from diffusion_pl.training.module import Augment, DiffusionModule, MakeOptimizer
from diffusion_pl.training.progress import Progress
from diffusion_pl.training.settings import (
    AUTOCAST,
    LIGHTNING_PRECISION,
    Settings,
    resolve_precision,
)


class Network(Protocol):
    """What a run asks of a network beside its forward pass; an nn.Module."""

    classes: int
    channels: int

    def check_resolution(self, height: int, width: int) -> None: ...


@dataclass(frozen=True)
class Experiment:
    """Everything that a run is made of, built.

    Args:
        name: of the experiment.
        config: the resolved config, plain containers, kept in the checkpoints.
        seed: of everything random in training.
    """

    name: str
    config: Mapping[str, Any]
    seed: int
    settings: Settings
    data: Source
    network: nn.Module
    objective: Objective
    optimizer: MakeOptimizer
    ema: EMA
    sampler: Sampler
    extractor: Extractor
    evaluation: Evaluation
    augment: Augment | None = None


class CheckpointFiles(CheckpointIO):
    """Lightning's way to the disk, through our atomic writer and our careful reader."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        checkpoints.save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return checkpoints.load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink()


class RunData(lightning.LightningDataModule):
    """Hands each device its share of every global batch, from the position of the run on.

    Args:
        source: the data.
        settings: the run's settings.
        seed: of the order and the flips.
    """

    def __init__(self, source: Source, settings: Settings, seed: int) -> None:
        super().__init__()
        self.source = source
        self.settings = settings
        self.seed = seed
        self.images: Images | None = None

    def prepare_data(self) -> None:
        """Download or check the data, once a machine."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Open the data in this process."""
        if self.images is None:
            self.images = self.source.open()

    def opened(self) -> Images:
        """The images, once `setup` has opened them."""
        assert self.images is not None
        return self.images

    def train_dataloader(self) -> Loader:
        """The micro-batches of this rank that are still to come."""
        trainer, images = self.trainer, self.opened()
        assert trainer is not None
        batch_size = self.source.batch_size
        size = self.settings.share_size(batch_size, trainer.world_size)
        share = Share(batch_size, size, trainer.global_rank, trainer.world_size)
        batches = MicroBatches(
            images, Order(len(images), self.seed), share, hflip=self.source.hflip
        )
        return Loader(
            batches,
            start=trainer.global_step * share.accumulation,
            stop=self.settings.steps(batch_size) * share.accumulation,
            workers=self.source.workers,
            pin=self.settings.device_type() == "cuda",
        )

    def transfer_batch_to_device(
        self, batch: dict[str, Tensor], device: torch.device, dataloader_idx: int
    ) -> dict[str, Tensor]:
        """Move images as uint8, and labels; positions stay on the host, where they seed."""
        return {
            key: value if key == "index" else value.to(device, non_blocking=True)
            for key, value in batch.items()
        }


def fit(experiment: Experiment, run: Path, references_folder: Path) -> dict[str, Any]:
    """Train to the end of the budget, from the run's last checkpoint if there is one.

    Args:
        experiment: the parts.
        run: the run's folder; made if absent.
        references_folder: where statistics of real images are kept.

    Returns:
        {"images": images seen, "rows": the last measurements}.

    Raises:
        ValueError: parts that do not fit one another, or a folder that cannot be written.
        NonFiniteLoss: names the step and the noise levels.
    """
    settings, source = experiment.settings, experiment.data
    data = RunData(source, settings, experiment.seed)
    with quiet_lightning():
        precision = resolve_precision(settings.precision, settings.device_type())
        trainer = make_trainer(experiment, run, precision)
        size = settings.share_size(source.batch_size, trainer.world_size)
        trainer.accumulate_grad_batches = source.batch_size // (size * trainer.world_size)
        if trainer.local_rank == 0:
            data.prepare_data()
        data.setup("fit")
        images = data.opened()
        module = make_module(experiment, images)
        reference = reference_of(images, experiment.extractor, references_folder)
        history = History(run / "metrics.jsonl")
        progress = Progress(trainer.max_steps * source.batch_size)
        log = Log(history, settings.log_every, progress)
        trainer.callbacks.extend(  # type: ignore[attr-defined]
            [
                log,
                Checkpoints(
                    run / "checkpoints", settings.checkpoint_every, settings.keep, experiment.config
                ),
                Evaluate(
                    experiment.evaluation,
                    experiment.sampler,
                    experiment.extractor,
                    reference,
                    classes=module.classes,
                    shape=(images.channels, images.resolution, images.resolution),
                    precision=AUTOCAST[precision],
                    run=run,
                    history=history,
                    training_log=log,
                ),
            ]
        )
        try:
            latest = checkpoints.latest(run / "checkpoints")
            trainer.fit(module, datamodule=data, ckpt_path=latest)
        finally:
            progress.stop()
    return {"images": module.images_seen, "rows": last_measurements(history)}


def make_trainer(experiment: Experiment, run: Path, precision: str) -> lightning.Trainer:
    """Lightning's Trainer with everything of its own that we replace switched off."""
    settings = experiment.settings
    on_cpu = settings.device_type() == "cpu"
    return lightning.Trainer(
        accelerator=settings.accelerator,
        devices=1 if on_cpu and settings.devices == "auto" else settings.devices,
        num_nodes=settings.nodes,
        precision=LIGHTNING_PRECISION[precision],  # type: ignore[arg-type]
        max_steps=settings.steps(experiment.data.batch_size),
        max_epochs=-1,
        gradient_clip_val=settings.clip,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2**31,  # rows are ours, by images
        logger=make_loggers(experiment, run),
        plugins=[CheckpointFiles()],
        default_root_dir=run,
        benchmark=True,
    )


def make_module(experiment: Experiment, images: Images) -> DiffusionModule:
    """The LightningModule, once the network is known to take these images.

    Raises:
        ValueError: a resolution, channels or classes that the network was not built for.
    """
    settings = experiment.settings
    network = cast(Network, experiment.network)
    network.check_resolution(images.resolution, images.resolution)
    if network.channels != images.channels:
        raise ValueError(
            f"network.channels is {network.channels}, {images.name} has {images.channels}"
        )
    if network.classes and network.classes != images.classes:
        raise ValueError(
            f"network.classes is {network.classes}, {images.name} has {images.classes}; "
            f"set network.classes={images.classes}"
        )
    experiment.network.to(memory_format=torch.channels_last)
    module = DiffusionModule(
        experiment.network,
        experiment.objective,
        experiment.optimizer,
        experiment.ema,
        batch_size=experiment.data.batch_size,
        classes=network.classes,
        warmup=settings.warmup,
        label_dropout=settings.label_dropout,
        augment=experiment.augment,
        seed=experiment.seed,
    )
    if settings.compile:
        module.denoiser.network.compile()
        module.ema.network.compile()
    return module


def make_loggers(experiment: Experiment, run: Path) -> list[Logger]:
    """The loggers that the experiment names; each run has one folder, resumed in place."""
    loggers: list[Logger] = []
    if "tensorboard" in experiment.settings.loggers:
        loggers.append(TensorBoardLogger(run, name="", version="tensorboard"))
    if "wandb" in experiment.settings.loggers:
        loggers.append(
            WandbLogger(project="diffusion_pl", name=run.name, id=run.name, save_dir=run)
        )
    return loggers


def last_measurements(history: History) -> list[dict[str, Any]]:
    """The rows of the newest evaluation."""
    rows = [row for row in history.rows() if "name" in row]
    return [row for row in rows if row["images"] == rows[-1]["images"]]


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's banners and hints about its own progress bar off the terminal."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Workers are our choice: images in memory are read fastest without.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # The average is a registered module that never trains, as we want it.
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
            # Lightning's own use of torch's trees.
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
