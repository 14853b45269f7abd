"""Before the first step of a run: compare ranks, data and code with the run's record."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from diffusion_pl.diffusion.conditions import sizes
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.prompts import TextEncoder
from diffusion_pl.io.files import read_small, write_atomically
from diffusion_pl.locks import Lock
from diffusion_pl.progress import Progress
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import sameness
from diffusion_pl.training.history import RECORD


@dataclass(frozen=True)
class Start:
    """How a process starts or resumes a run.

    Args:
        checkpoint: to resume from; None: from the beginning.
        origin: the checkpoint whose weights a new run starts from; None: initial weights.
        encoder: of the captions that these weights were trained with; None where it is not known.
        data_changed: whether the user allows resuming with other data.
        lock: on the run's folder, held by rank 0; None on other ranks.
        keep: called on rank 0 before the first step with the images seen; writes the config.
    """

    checkpoint: Path | None = None
    origin: Path | None = None
    encoder: TextEncoder | None = None
    data_changed: bool = False
    lock: Lock | None = None
    keep: Callable[[int], None] | None = None

    def check(self) -> None:
        """Check that this process may still write to the run.

        Raises:
            LockLostError: another process has taken the run over.
        """
        if self.lock is not None:
            self.lock.check()


def class_names(run: Path) -> list[str]:
    """Class names in a run's record; [] if there are none."""
    try:
        names = json.loads(read_small(run / RECORD))["class_names"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    return names if isinstance(names, list) and all(type(name) is str for name in names) else []


class Begin(Callback):
    """Refuses ranks that differ and data that is not the run's; a run's first callback.

    Args:
        run: the run's folder.
        start: how it starts or resumes.
        tree: the resolved config.
        progress: reports what changed.
    """

    def __init__(
        self, run: Path, start: Start, tree: Mapping[str, Any], progress: Progress
    ) -> None:
        self.run, self.start, self.tree, self.progress = run, start, tree, progress
        self.data: dict[str, Any] = {}
        self.code = ""
        self.known = False  # whether the run's record states the training data
        self.changes: list[str] = []  # written by rank 0

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Compare the ranks, then the data with the run's record.

        Raises:
            UserError: on every rank; names what differs.
        """
        device, start = trainer.strategy.root_device, self.start
        if start.encoder is not None:
            opened = trainer.datamodule.opened()  # type: ignore[attr-defined]
            start.encoder.check(opened)
        self.data = sameness.data_of(trainer.datamodule.images)  # type: ignore[attr-defined]
        self.code = sameness.code_of(self.tree)
        files = {"checkpoint": start.checkpoint, "from": start.origin}
        state = {
            name: None if path is None else f"{path.name} {checkpoints.digest(path)}"
            for name, path in files.items()
        }
        token = None if start.lock is None else start.lock.holder.token
        sameness.share_folder(self.run, token, device)
        facts = sameness.facts_of(self.tree, training_data=self.data, code=self.code, start=state)
        sameness.agree(facts, device)
        before = self._record() if trainer.is_global_zero and start.checkpoint else {}
        said = json.loads(sameness.from_first(json.dumps(before), device))
        if isinstance(said.get("data"), dict):
            self.known = True
            self._compare_data(said["data"])
        if said.get("code", self.code) != self.code:
            self.changes.append(f"code: {said['code']} -> {self.code}")

    def _record(self) -> dict[str, Any]:
        """The run's record; {} if absent or damaged."""
        try:
            record = json.loads(read_small(self.run / RECORD))
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Compare the data with the checkpoint's if the run has no record."""
        before = checkpoint[checkpoints.SECTION].get("data")
        if not self.known and isinstance(before, dict):
            self._compare_data(before)

    def _compare_data(self, before: Mapping[str, Any]) -> None:
        """Refuse other data, or note it where the user allows it.

        Raises:
            UserError: the data differs and `data_changed` is false.
        """
        difference = sameness.data_changed(before, self.data)
        if difference is None:
            return
        if not self.start.data_changed:
            raise UserError(
                f"{self.run}: the training data has changed since the run was begun "
                f"({difference}); restore it, name another folder (RUN=...), or go on with it: "
                "--data-changed"
            )
        self.changes.append(f"training data: {difference}")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Write the config and the record before the first step."""
        if not trainer.is_global_zero:
            return
        images = pl_module.images_seen
        self.start.check()
        if self.start.keep is not None:
            self.start.keep(images)
        for change in self.changes:
            self.progress.say(f"{self.run}: {change}; going on")
        sameness.note(self.run, images, self.changes)
        about = self.about()
        names = trainer.datamodule.opened().class_names  # type: ignore[attr-defined]
        if names and sizes(pl_module.denoiser.network)["label"]:
            # For readers of the file; checkpoints have them too.
            about["class_names"] = list(names)
        record = json.dumps(about, indent=1) + "\n"
        write_atomically(self.run / RECORD, lambda file: file.write(record.encode()))

    def about(self) -> dict[str, Any]:
        """What a checkpoint records beside its config."""
        return {"data": self.data, "code": self.code}
