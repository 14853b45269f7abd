"""Checkpoints on disk: written atomically, verified by digest, read without running any code.

A checkpoint is Lightning's dictionary plus an entry "diffusion_pl": format number, resolved config
as plain containers, images seen. It is torch's zip archive with the sha256 of all bytes before it
as the archive's comment: torch alone loads most flipped bits silently. No lightning is imported
here, so sampling from a run does not need it.
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
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_pl.config.renaming import renamed
from diffusion_pl.config.tree import plain
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.prompts import TextEncoder
from diffusion_pl.io.files import read_small, regular, sha256_of, write_atomically
from diffusion_pl.io.unpickle import reason_of, unfit_content, unfit_entries
from diffusion_pl.names import shown

CLASS_NAMES = "class_names"
TEXT_ENCODER = "text_encoder"
FORMAT = 2
READABLE = (1, 2)  # format 1 was without a digest
SECTION = "diffusion_pl"
LATEST = "latest"
DAMAGED = ".damaged"  # suffix that a damaged checkpoint is renamed to

_LONGEST_NAME = 240  # of a file, with room for suffixes

# The end of a zip archive: a signature, 16 bytes, and the length of the comment that follows.
_END, _END_BYTES = b"PK\x05\x06", 22
_MARK = b"sha256:"
_COMMENT_BYTES = len(_MARK) + 64

# The images seen, as `name_of` writes them. Files of other names, such as `best.ckpt`, are the
# user's: they are neither resumed from nor counted nor removed.
_NAME = re.compile(r"([0-9]{12}|[1-9][0-9]{12,})\.ckpt")

logger = logging.getLogger(__name__)


class DamagedError(UserError):
    """A checkpoint whose bytes are not those that were written."""


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
    """Check that a checkpoint is as it was written.

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
    """sha256 (hex) of a file's first bytes, with the comment length at their end as zeros."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        left = length - 2
        while left > 0 and (block := file.read(min(left, 2**22))):
            sha256.update(block)
            left -= len(block)
    sha256.update(b"\0\0")
    return sha256.hexdigest()


def digest(path: Path) -> str:
    """sha256 (hex) of a checkpoint: its stored digest, else that of the whole file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _COMMENT_BYTES))
        end = file.read()
    if end.startswith(_MARK):
        return end[len(_MARK) :].decode(errors="replace")
    return sha256_of(path)


def point_to(path: Path) -> None:
    """Point `latest`, in the same folder, to a checkpoint."""
    write_atomically(path.parent / LATEST, lambda file: file.write(path.name.encode()))


def name_of(images: int) -> str:
    """File name of the checkpoint after `images` images."""
    return f"{images:012d}.ckpt"


def found(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    own = (each for each in folder.glob("*.ckpt") if _NAME.fullmatch(each.name) and each.is_file())
    return sorted(own, key=lambda path: int(path.stem))


def prune(folder: Path, images: int, keep: int, stays: Callable[[int], bool]) -> None:
    """Remove a run's checkpoints except the newest few.

    Kept as well: files of other names, links and their targets, the target of `latest`, and
    checkpoints newer than the run, which another process or the user put there.

    Args:
        folder: of the checkpoints.
        images: seen by the run.
        keep: how many of the newest stay.
        stays: by images, whether a checkpoint stays for good.
    """
    past = [path for path in found(folder) if int(path.stem) <= images]
    kept = {_pointed(folder), *_linked(folder)}
    for old in past[:-keep]:
        if not (old.name in kept or old.is_symlink() or stays(int(old.stem))):
            old.unlink(missing_ok=True)


def _linked(folder: Path) -> set[str]:
    """Names of checkpoints that links in their folder or the run's point to."""
    links = [each for place in (folder, folder.parent) for each in place.iterdir()]
    found = (Path(os.path.realpath(each)) for each in links if each.is_symlink())
    return {each.name for each in found if each.parent == Path(os.path.realpath(folder))}


def _pointed(folder: Path) -> str | None:
    """The name in the `latest` pointer; None if absent."""
    pointer = folder / LATEST
    if pointer.is_symlink():  # as other programs and people make it
        return os.readlink(pointer)
    try:
        return read_small(pointer).decode(errors="replace").strip()
    except FileNotFoundError:
        return None


def latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, else the newest; None when nothing was saved yet.

    Raises:
        UserError: the pointer names no checkpoint, or one that is lost with all others.
    """
    return next(iter(_candidates(folder)), None)


def newest_sound(folder: Path, *, mend: bool = True) -> Path | None:
    """The newest undamaged checkpoint; None when nothing was saved yet.

    Damaged ones are reported in one line and renamed.

    Args:
        folder: of the checkpoints.
        mend: rename damaged ones and point `latest` to the result; on one rank only.

    Raises:
        UserError: all checkpoints are damaged; or as `latest`.
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
    """The checkpoints that a run may resume from, first choice first; raises as `latest`."""
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
    """Read a checkpoint of this package: tensors and plain containers only (weights_only).

    Raises:
        UserError: absent, damaged, holding code, or of another format.
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
    except Exception as error:  # a damaged pickle may raise anything
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
    """A checkpoint's config, in today's names, and the images that it has seen.

    Args:
        checkpoint: from `load`.
        path: for error messages.

    Raises:
        UserError: either is missing.
    """
    section = checkpoint[SECTION]
    config, images = section.get("config"), section.get("images")
    if not isinstance(config, dict) or type(images) is not int or images < 0:
        raise UserError(f"{path}: does not say its config and the images that it has seen")
    if not isinstance(checkpoint.get("state_dict"), Mapping):
        raise UserError(f"{path}: has no state_dict, names to tensors")
    return renamed(plain(config, str(path))), images


def class_names(checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names of the run's data; () if there are none."""
    names = checkpoint.get(CLASS_NAMES)
    fine = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if fine and names is not None else ()


def text_encoder(checkpoint: Mapping[str, Any], path: Path) -> TextEncoder | None:
    """The encoder of the run's captions; None for a run without text.

    Raises:
        UserError: what is said of it is none.
    """
    said = checkpoint.get(TEXT_ENCODER)
    if said is None:
        return None
    kinds = {field.name: str if field.name in ("name", "digest") else int
             for field in fields(TextEncoder)}  # fmt: skip
    if not isinstance(said, Mapping) or {key: type(each) for key, each in said.items()} != kinds:
        raise UserError(f"{path}: does not say by which encoder its captions were encoded")
    return TextEncoder(**said)


def _check_text(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights of a network that takes other texts, or that alone takes some."""
    found, own = (each.get("network.null_text", torch.zeros(0, 0)) for each in (given, wanted))
    if found.ndim == own.ndim and found.shape != own.shape:
        (length, width), (own_length, own_width) = found.shape, own.shape
        raise UserError(
            f"{path}: its network has text_length {length} and text_width {width}, this one "
            f"{own_length} and {own_width}; set network.text_length={length} "
            f"network.text_width={width}, or do not start from it"
        )


def match_weights(
    module: nn.Module, checkpoint: Mapping[str, Any], which: str, path: Path
) -> dict[str, Tensor]:
    """All weights of a denoiser, from a checkpoint.

    Args:
        module: the denoiser, built from the checkpoint's config.
        checkpoint: from `load`.
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
    _check_text(state, wanted, path)
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
