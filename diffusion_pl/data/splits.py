"""Names of splits, such as `train`, `val` and `test`, in the names of folders and files.

A split is never a class, and splits are joined only where the user says `all`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from diffusion_pl.errors import UserError

ALL = "all"

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
    "unlabeled": ("unlabeled", "unlabelled"),
    "extra": ("extra",),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}

# `train` and its usual forms: `training_set`, `train2017`, `images-val`, `test_images`.
_PUT = re.compile(
    r"(?:(?:images?|imgs?|data)[-_ ]?)?"
    rf"({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})"
    r"(?:[-_ ]?(?:set|data|images?|imgs?))?(?:[-_ ]?\d+)?",
    re.IGNORECASE,
)

_NUMBERED = re.compile(r"(.+?)-\d+-of-\d+$")


def split_of(word: str) -> str | None:
    """The split that a word names, `train`, `val`, ...; None for another word."""
    found = _PUT.fullmatch(word)
    return None if found is None else _SPLIT_OF[found[1].lower()]


def is_split(word: str, split: str) -> bool:
    """Whether a word names a split, in any of its forms."""
    known = split_of(split)
    return word.lower() == split.lower() or (known is not None and split_of(word) == known)


def files_of_split(files: Sequence[Path], split: str | None) -> list[Path]:
    """The files of one split, where their names hold several: `train-00000.tar`.

    Raises:
        UserError: several splits of which none is chosen, or one that is not there.
    """
    if split is not None and split.lower() == ALL:
        return list(files)
    words = {file: _first(file) for file in files}
    if split is not None:
        kept = [file for file in files if is_split(words[file], split)]
        if not kept:
            there = ", ".join(sorted({word for word in words.values() if word})) or "none"
            raise UserError(f"{files[0].parent}: no split {split!r} (there: {there})")
        return kept
    splits = sorted({word for word in words.values() if word})
    if len({split_of(word) or word for word in splits}) > 1:
        first = next((word for word in splits if is_split(word, "train")), splits[0])
        raise UserError(
            f"{files[0].parent}: holds several splits ({', '.join(splits)}); choose one by --split "
            f"{first}, or all as one set by --split {ALL}"
        )
    return list(files)


def _first(file: Path) -> str:
    """The word in a file's name that names a split, or NAME of NAME-0-of-9; "" for neither."""
    stem = file.name.partition(".")[0]
    words = (stem, *re.split(r"[^A-Za-z]+", stem))
    # Tables are named after their splits, whatever these are called: NAME-00000-of-00010.
    begin = _NUMBERED.match(stem)
    return next((word for word in words if split_of(word)), "" if begin is None else begin[1])
