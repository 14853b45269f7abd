"""TensorBoard, W&B and further loggers, beside metrics.jsonl; one that fails is given up."""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from omegaconf import OmegaConf
from torch import Tensor

from diffusion_pl import ranks
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small, write_atomically
from diffusion_pl.training.settings import TrainerConfig

log = logging.getLogger(__name__)

WANDB_ID = "wandb_id"  # file in a run's folder


def make_loggers(
    settings: TrainerConfig, config: Mapping[str, Any], run: Path, further: Sequence[Logger] = ()
) -> list[Logger]:
    """The loggers of an experiment, resumed in place.

    Args:
        settings: name the loggers.
        config: resolved; passed to W&B.
        run: the run's folder.
        further: loggers of the user's.

    Raises:
        UserError: W&B is not installed.
    """
    loggers: list[Logger] = []
    if "tensorboard" in settings.loggers:
        loggers.append(TensorBoardLogger(run, name="", version="tensorboard"))
    if "wandb" in settings.loggers:
        above = run.resolve().parent.name
        try:
            wandb = WandbLogger(
                project=settings.wandb_project,
                entity=settings.wandb_entity,
                # Runs of a sweep lie below the experiment: name/seed=0, name/seed=1, ...
                name=run.name if above in ("", "runs") else f"{above}/{run.name}",
                id=wandb_id(run) if ranks.leads_run() else None,
                resume="allow",
                save_dir=run,
                config=dict(config),
            )
        except ModuleNotFoundError as error:
            raise UserError(
                "trainer.loggers: wandb is not installed; pip install 'diffusion_pl[wandb]'"
            ) from error
        loggers.append(wandb)
    return [Unfailing(each) for each in (*loggers, *further)]


def wandb_id(run: Path) -> str:
    """A run's W&B id, kept in its folder; that of earlier versions was the folder's name."""
    path = run / WANDB_ID
    if not path.exists():
        known = run.name if (run / "wandb").is_dir() else uuid.uuid4().hex[:8]
        write_atomically(path, lambda file: file.write(f"{known}\n".encode()))
    return read_small(path).decode(errors="replace").strip()


class Unfailing(Logger):
    """Wraps a logger and drops it, with one warning, at its first failure.

    A full disk or an unreachable server should not end a run: metrics.jsonl has the numbers too.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self.logger: Logger | None = logger
        self.title = type(logger).__name__.removesuffix("Logger")
        _note_failing_threads()

    @property
    def name(self) -> str | None:
        return self.attempt(lambda logger: logger.name)

    @property
    def version(self) -> int | str | None:
        return self.attempt(lambda logger: logger.version)

    @property
    def save_dir(self) -> str | None:
        return self.attempt(lambda logger: logger.save_dir)

    @property
    def experiment(self) -> Any:
        """The logger's backend, such as a SummaryWriter; None once it has failed."""
        return self.attempt(lambda logger: logger.experiment)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.attempt(lambda logger: logger.log_metrics(dict(metrics), step=step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.attempt(lambda logger: logger.log_hyperparams(params, *args, **kwargs))

    def save(self) -> None:
        self.attempt(lambda logger: logger.save())

    def finalize(self, status: str) -> None:
        self.attempt(lambda logger: logger.finalize(status))

    def attempt(self, call: Callable[[Any], Any]) -> Any:
        """Call with the logger; None once a call has failed."""
        if self.logger is None:
            return None
        try:
            return call(self.logger)
        except Exception as error:  # each library has errors of its own
            self.logger = None
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning(
                "trainer.loggers: %s fails (%s); the run goes on without it, metrics.jsonl has "
                "its numbers",
                self.title,
                reason[:300],
            )
            return None


def _note_failing_threads() -> None:
    """Suppress the traceback of TensorBoard's writer thread; `attempt` reports its error."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if type(failed.thread).__name__ != "_AsyncWriterThread":
            before(failed)

    if getattr(before, "__qualname__", "") != hook.__qualname__:
        threading.excepthook = hook


class Described(Callback):
    """Writes the resolved config to TensorBoard; W&B gets it on creation."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        text = OmegaConf.to_yaml(OmegaConf.create(dict(self.config)))

        def tell(each: Logger) -> None:
            if isinstance(each, TensorBoardLogger):
                each.experiment.add_text("config", f"```yaml\n{text}```", pl_module.images_seen)

        _to_all(trainer, tell)


def show(trainer: lightning.Trainer, sheet: Tensor, images: int) -> None:
    """Log a grid of samples, uint8 (3, H, W), to TensorBoard and W&B; on rank 0."""

    def tell(each: Logger) -> None:
        if isinstance(each, TensorBoardLogger):
            each.experiment.add_image("samples", sheet, images)
        elif isinstance(each, WandbLogger):
            each.log_image("samples", [sheet.permute(1, 2, 0).numpy()], step=images)

    _to_all(trainer, tell)


def summarise(
    trainer: lightning.Trainer, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Log the settings with the final numbers, by which runs are sorted: TensorBoard's HParams,
    the summary of W&B.

    Args:
        trainer: at the end of a run.
        config: resolved.
        rows: of the last evaluation.
    """
    numbers = {f"final/{row['name']}": float(row["value"]) for row in rows}
    settings = dict(_settings("", config))

    def tell(each: Logger) -> None:
        if isinstance(each, TensorBoardLogger):
            each.log_hyperparams(settings, numbers)
        elif isinstance(each, WandbLogger):
            each.experiment.summary.update(numbers)

    _to_all(trainer, tell)


def _settings(key: str, value: Any) -> Iterator[tuple[str, str | float | bool]]:
    """The settings of a config by their dotted keys; other than numbers as text."""
    if isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from _settings(f"{key}.{name}" if key else str(name), each)
    elif isinstance(value, bool | int | float):
        yield key, value
    else:
        yield key, value if isinstance(value, str) else json.dumps(value)


def _to_all(trainer: lightning.Trainer, tell: Callable[[Logger], None]) -> None:
    if not trainer.is_global_zero:
        return
    for each in trainer.loggers:
        (each if isinstance(each, Unfailing) else Unfailing(each)).attempt(tell)
