"""Checkpoints on disk: written whole or not at all, read without running anything that they hold.

A checkpoint is Lightning's dictionary plus an entry "diffusion_pl": the format number, the resolved
config as plain containers, the images seen. It is a zip archive, as torch writes it, whose comment
is the sha256 of all before it: torch alone loads nearly every flipped bit without a word. This file
does not import lightning, so drawing images from a run does not either.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_pl.config.renaming import renamed
from diffusion_pl.config.tree import plain
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small, regular, sha256_of, write_atomically
from diffusion_pl.io.unpickle import reason_of, unfit_content, unfit_entries
from diffusion_pl.names import shown

CLASS_NAMES = "class_names"
FORMAT = 2
READABLE = (1, 2)  # format 1 was without a digest
SECTION = "diffusion_pl"
LATEST = "latest"
DAMAGED = ".damaged"  # what a damaged checkpoint's name ends in from then on

_LONGEST_NAME = 240  # of a file, and of it with what is added

# The end of a zip archive: a signature, 16 bytes, and the length of the comment that follows.
_END, _END_BYTES = b"PK\x05\x06", 22
_MARK = b"sha256:"
_COMMENT_BYTES = len(_MARK) + 64

# The images seen, as `name_of` writes them. Files of other names are the user's: `best.ckpt` is
# neither gone on with nor counted nor removed.
_NAME = re.compile(r"([0-9]{12}|[1-9][0-9]{12,})\.ckpt")

logger = logging.getLogger(__name__)


class DamagedError(UserError):
    """A checkpoint that is not as it was written."""


def save(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint atomically.

    Raises:
        UserError: the folder cannot be written or is full.
    """

    def write(file: Any) -> None:
        torch.save(dict(checkpoint), file)
        file.flush()
        comment = _MARK + _digest(Path(file.name), file.tell()).encode()
        file.seek(-2, os.SEEK_END)  # torch writes no comment, so its length is the file's end
        file.write(struct.pack("<H", len(comment)) + comment)

    write_atomically(path, write)


def verify(path: Path) -> None:
    """See that a checkpoint is as it was written.

    Raises:
        DamagedError: it is not.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with regular(path).open("rb") as file:
        file.seek(max(0, size - _END_BYTES - _COMMENT_BYTES))
        end = file.read()
    comment = end[_END_BYTES:]
    if end.startswith(_END) and comment.startswith(_MARK):
        written = comment[len(_MARK) :].decode(errors="replace")
        length = struct.unpack("<H", end[_END_BYTES - 2 : _END_BYTES])[0]
        sound = length == len(comment) and _digest(path, size - len(comment)) == written
    else:
        sound = end[-_END_BYTES:].startswith(_END)  # format 1 had no comment
    if not sound:
        raise DamagedError(f"{path}: is damaged; its bytes are not those that were written")


def _digest(path: Path, length: int) -> str:
    """sha256 (hex) of a file's first bytes, the last two of them, a length to come, as zeros."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        left = length - 2
        while left > 0 and (block := file.read(min(left, 2**22))):
            sha256.update(block)
            left -= len(block)
    sha256.update(b"\0\0")
    return sha256.hexdigest()


def digest(path: Path) -> str:
    """sha256 (hex) of a checkpoint: the one that it carries, else that of the whole file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _COMMENT_BYTES))
        end = file.read()
    if end.startswith(_MARK):
        return end[len(_MARK) :].decode(errors="replace")
    return sha256_of(path)


def point_to(path: Path) -> None:
    """Make the `latest` pointer beside a checkpoint name it."""
    write_atomically(path.parent / LATEST, lambda file: file.write(path.name.encode()))


def name_of(images: int) -> str:
    """The file of a run's checkpoint after so many images."""
    return f"{images:012d}.ckpt"


def found(folder: Path) -> list[Path]:
    """The checkpoints that a run has written, oldest first."""
    own = (each for each in folder.glob("*.ckpt") if _NAME.fullmatch(each.name) and each.is_file())
    return sorted(own, key=lambda path: int(path.stem))


def prune(folder: Path, images: int, keep: int, stays: Callable[[int], bool]) -> None:
    """Remove a run's checkpoints but the newest few.

    Files of other names stay, and what `latest` names or a link in the run's folder leads to, links
    themselves, and what is newer than the run itself: it was put back, or another has been here.

    Args:
        folder: the run's checkpoints.
        images: that the run has seen.
        keep: newest ones, up to there, that stay.
        stays: whether the one of so many images stays for good.
    """
    past = [path for path in found(folder) if int(path.stem) <= images]
    kept = {_pointed(folder), *_linked(folder)}
    for old in past[:-keep]:
        if not (old.name in kept or old.is_symlink() or stays(int(old.stem))):
            old.unlink(missing_ok=True)


def _linked(folder: Path) -> set[str]:
    """The checkpoints that links beside them, or in the run's folder, lead to."""
    links = [each for place in (folder, folder.parent) for each in place.iterdir()]
    found = (Path(os.path.realpath(each)) for each in links if each.is_symlink())
    return {each.name for each in found if each.parent == Path(os.path.realpath(folder))}


def _pointed(folder: Path) -> str | None:
    """What the `latest` pointer says, None where there is none."""
    pointer = folder / LATEST
    try:
        return read_small(pointer).decode(errors="replace").strip()
    except FileNotFoundError:
        return None


def latest(folder: Path) -> Path | None:
    """The checkpoint that the `latest` pointer names, None when nothing was saved yet.

    Where the pointer or its file is gone, the newest that is there.

    Raises:
        UserError: the pointer names what is no checkpoint, or one of which nothing is left.
    """
    return next(iter(_candidates(folder)), None)


def newest_sound(folder: Path, *, mend: bool = True) -> Path | None:
    """The newest checkpoint that is as it was written; None when nothing was saved yet.

    One that is damaged is named in one line and set aside, so that it is neither gone on with nor
    counted among those that stay.

    Args:
        folder: the run's checkpoints.
        mend: set damaged ones aside and have `latest` name the one that is found; of ranks that
            look at once, one does.

    Raises:
        UserError: checkpoints are there, and all are damaged; or as `latest`.
    """
    candidates = _candidates(folder)
    for candidate in candidates:
        try:
            verify(candidate)
        except FileNotFoundError:
            continue
        except DamagedError as error:
            if mend:
                with contextlib.suppress(OSError):
                    candidate.rename(candidate.with_name(candidate.name + DAMAGED))
            logger.warning("%s; going on with the one before", shown(str(error)))
            continue
        if mend and candidate.name != _pointed(folder):
            point_to(candidate)
        return candidate
    if candidates or any(folder.glob(f"*{DAMAGED}")):
        raise UserError(f"{folder}: every checkpoint is damaged; start in another folder")
    return None


def _candidates(folder: Path) -> list[Path]:
    """The checkpoints that a run may go on with, the first choice first.

    Raises:
        UserError: the pointer names what is no checkpoint, or one of which nothing is left.
    """
    pointer, name = folder / LATEST, _pointed(folder)
    newest_first = found(folder)[::-1]
    if name is None:
        if newest_first:
            logger.warning("%s: is not there; taking the newest checkpoint", pointer)
        return newest_first
    if not name or len(name) > _LONGEST_NAME:
        raise UserError(
            f"{pointer}: names no checkpoint (got {name[:40]!r}); write the name of one into it, "
            f"or remove it"
        )
    path = folder / name
    there, damaged = path.is_file(), path.with_name(f"{path.name}{DAMAGED}").exists()
    if path.parent != folder or not (there or damaged or newest_first):
        raise UserError(
            f"{pointer}: names {path.name!r}, which is not there; restore it or remove the pointer"
        )
    if not _NAME.fullmatch(path.name):
        raise UserError(
            f"{pointer}: names {path.name!r}; a checkpoint here is named by its images, such as "
            f"000000040000.ckpt"
        )
    if not there and not damaged:
        logger.warning(
            "%s: names %s, which is not there; taking the newest checkpoint", pointer, path.name
        )
        return newest_first
    return [each for each in newest_first if int(each.stem) <= int(path.stem)]


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this package.

    Only tensors and plain containers are read (torch's weights_only); nothing in the file is run.

    Raises:
        UserError: not there, damaged, holding code, or of another format.
    """
    try:
        verify(path)
        with zipfile.ZipFile(path) as archive:
            digested = archive.comment.startswith(_MARK)
            problem = unfit_entries(archive, path.stat().st_size, digested=digested)
        checkpoint: Any = None
        if problem is None:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            problem = unfit_content(checkpoint)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such checkpoint") from error
    except DamagedError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors and plain data; refused ({reason_of(error)})"
        ) from error
    except Exception as error:  # a pickle that others have spoilt raises nearly anything
        raise DamagedError(
            f"{path}: cannot be read as a checkpoint ({reason_of(error)})"
        ) from error
    if problem is not None:
        raise UserError(f"{path}: {problem}; refused")
    section = checkpoint.get(SECTION) if isinstance(checkpoint, dict) else None
    section = section if isinstance(section, dict) else {}
    number = section.get("format", "none")
    if type(number) is not int or section.get("format") not in READABLE:
        raise UserError(
            f"{path}: not a checkpoint of diffusion_pl's format {FORMAT} (format: {number})"
        )
    if section["format"] >= 2 and not digested:
        raise DamagedError(f"{path}: is damaged; its digest is missing")
    return checkpoint


def described(checkpoint: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], int]:
    """The config that a checkpoint carries, in today's names, and the images that it has seen.

    Args:
        checkpoint: as `load` gives it.
        path: for error messages.

    Raises:
        UserError: it carries none.
    """
    section = checkpoint[SECTION]
    config, images = section.get("config"), section.get("images")
    if not isinstance(config, dict) or type(images) is not int or images < 0:
        raise UserError(f"{path}: does not say its config and the images that it has seen")
    if not isinstance(checkpoint.get("state_dict"), Mapping):
        raise UserError(f"{path}: has no state_dict, names to tensors")
    return renamed(plain(config, str(path))), images


def class_names(checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes that the run's data had; () where it keeps none."""
    names = checkpoint.get(CLASS_NAMES)
    fine = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if fine and names is not None else ()


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
        UserError: names the first key that is missing, surplus or of another shape.
    """
    prefix = f"{which}."
    given = checkpoint.get("state_dict")
    if not isinstance(given, Mapping) or not all(isinstance(v, Tensor) for v in given.values()):
        raise UserError(f"{path}: has no state_dict, names to tensors")
    state = {
        str(key).removeprefix(prefix): value
        for key, value in given.items()
        if str(key).startswith(prefix)
    }
    wanted = module.state_dict()
    for key in [*wanted, *state]:
        if key not in state:
            raise UserError(f"{path}: {prefix}{key} is missing")
        if key not in wanted:
            raise UserError(f"{path}: {prefix}{key} is not in the network that its config builds")
        if state[key].shape != wanted[key].shape:
            raise UserError(
                f"{path}: {prefix}{key} has shape {tuple(state[key].shape)}, "
                f"the network {tuple(wanted[key].shape)}"
            )
    return state
