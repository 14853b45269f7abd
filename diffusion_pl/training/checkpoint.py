"""Checkpoints on disk: written whole or not at all, read without running anything that they hold.

A checkpoint is Lightning's dictionary plus an entry "diffusion_pl": the format number, the resolved
config as plain containers, the images seen. This file does not import lightning, so drawing images
from a run does not either.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 1
SECTION = "diffusion_pl"
LATEST = "latest"


def write_atomically(path: Path, write: Any) -> None:
    """Write beside the target, flush to the disk, then rename: the target is whole or as before.

    Args:
        path: the file to make or replace.
        write: called with the open binary file.

    Raises:
        ValueError: the folder cannot be written or is full; the target is as before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ValueError(
            f"{path}: cannot be written ({error}); free space or permissions, then run again"
        ) from error


def save(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint atomically.

    Raises:
        ValueError: the folder cannot be written or is full.
    """
    write_atomically(path, lambda file: torch.save(dict(checkpoint), file))


def point_to(path: Path) -> None:
    """Make the `latest` pointer beside a checkpoint name it."""
    write_atomically(path.parent / LATEST, lambda file: file.write(path.name.encode()))


def found(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("*.ckpt"))


def latest(folder: Path) -> Path | None:
    """The checkpoint that the `latest` pointer names, None when nothing was saved yet.

    Raises:
        ValueError: the pointer names a file that is not there.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    if path.parent != folder or not path.is_file():
        raise ValueError(
            f"{pointer}: names {path.name!r}, which is not there; restore it or remove the pointer"
        )
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this package.

    Only tensors and plain containers are read (torch's weights_only); nothing in the file is run.

    Raises:
        ValueError: not there, damaged, holding code, or of another format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            stored = sum(entry.file_size for entry in archive.infolist())
        if stored > path.stat().st_size:
            raise ValueError(f"{path}: its entries are larger than the file; refused")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such checkpoint") from error
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path}: holds more than tensors and plain data; refused ({reason})"
        ) from error
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint ({error})") from error
    section = checkpoint.get(SECTION) if isinstance(checkpoint, dict) else None
    if not isinstance(section, dict) or section.get("format") != FORMAT:
        found = section.get("format") if isinstance(section, dict) else "none"
        raise ValueError(
            f"{path}: not a checkpoint of diffusion_pl's format {FORMAT} (format: {found})"
        )
    return checkpoint


def load_weights(module: nn.Module, checkpoint: Mapping[str, Any], which: str, path: Path) -> None:
    """Fill a denoiser from a checkpoint.

    Raises:
        ValueError: names the first key that is missing, surplus or of another shape.
    """
    module.load_state_dict(match_weights(module, checkpoint, which, path))


def match_weights(
    module: nn.Module, checkpoint: Mapping[str, Any], which: str, path: Path
) -> dict[str, Tensor]:
    """The weights of a checkpoint that a denoiser takes, all of them.

    Args:
        module: the denoiser, built from the checkpoint's config.
        checkpoint: as `load` gives it.
        which: "ema" or "denoiser", the averaged or the raw weights.
        path: for error messages.

    Raises:
        ValueError: names the first key that is missing, surplus or of another shape.
    """
    prefix = f"{which}."
    state = {
        key.removeprefix(prefix): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(prefix)
    }
    wanted = module.state_dict()
    for key in [*wanted, *state]:
        if key not in state:
            raise ValueError(f"{path}: {prefix}{key} is missing")
        if key not in wanted:
            raise ValueError(f"{path}: {prefix}{key} is not in the network that its config builds")
        if state[key].shape != wanted[key].shape:
            raise ValueError(
                f"{path}: {prefix}{key} has shape {tuple(state[key].shape)}, "
                f"the network {tuple(wanted[key].shape)}"
            )
    return state
