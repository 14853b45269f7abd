"""A logger beside metrics.jsonl that may fail: the run goes on without it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)


class Unfailing(Logger):
    """A logger that is given up, in one line, at its first failure.

    A full disk, a folder that may not be written or a server that is down would otherwise end a
    run of days for the sake of its curves, which metrics.jsonl has too.

    Args:
        logger: Lightning's.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self.logger: Logger | None = logger
        self.title = type(logger).__name__.removesuffix("Logger")
        _note_failing_threads()

    @property
    def name(self) -> str | None:
        """As the logger says."""
        return self.attempt(lambda logger: logger.name)

    @property
    def version(self) -> int | str | None:
        """As the logger says."""
        return self.attempt(lambda logger: logger.version)

    @property
    def save_dir(self) -> str | None:
        """As the logger says."""
        return self.attempt(lambda logger: logger.save_dir)

    @property
    def experiment(self) -> Any:
        """What the logger writes with, made on the first call; None once it has failed."""
        return self.attempt(lambda logger: logger.experiment)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write numbers."""
        self.attempt(lambda logger: logger.log_metrics(dict(metrics), step=step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write the config."""
        self.attempt(lambda logger: logger.log_hyperparams(params, *args, **kwargs))

    def save(self) -> None:
        """Write what waits to be."""
        self.attempt(lambda logger: logger.save())

    def finalize(self, status: str) -> None:
        """End it."""
        self.attempt(lambda logger: logger.finalize(status))

    def attempt(self, call: Callable[[Any], Any]) -> Any:
        """What a call of the logger gives; None, from now on, if it fails."""
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
    """Keep the traceback of TensorBoard's writing thread off the terminal.

    The thread hands its error to the next call, which `attempt` tells in one line.
    """
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if type(failed.thread).__name__ != "_AsyncWriterThread":
            before(failed)

    if getattr(before, "__qualname__", "") != hook.__qualname__:
        threading.excepthook = hook
