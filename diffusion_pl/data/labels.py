"""Class numbers, from 0 on, from the labels of a source, which are numbers or words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusion_pl.data.files import refuse_control
from diffusion_pl.errors import UserError

LARGEST_CLASS = 1_000_000
_LONGEST_NAME = 200

# Names of columns and fields that may hold labels, where none is called `label`.
LIKE_LABELS = re.compile(r"(.*_)?(label|class|category|target)s?(_?(id|idx|index|name))?", re.I)


@dataclass
class ImageLabels:
    """The class of each image.

    Args:
        labels: of each image, in [0, classes).
        classes: how many.
        names: of the classes in order; None where the source has only numbers.
        source: what they were read from, in words.
        notes: for the user.
    """

    labels: list[int]
    classes: int
    names: list[str] | None
    source: str
    notes: list[str] = field(default_factory=list)


def sort_class_names(words: Iterable[str]) -> list[str]:
    """Sort the names of classes: 2 before 10 where all are numbers."""
    every = set(words)
    if all(word.isascii() and word.isdecimal() for word in every):
        return sorted(every, key=lambda word: (int(word), word))
    return sorted(every)


def number_labels(
    values: Sequence[Any], where: str, names: Sequence[str] | None = None
) -> ImageLabels:
    """Turn labels as a source has them into class numbers.

    Args:
        values: whole numbers, as int or float, which are kept; or words, which are numbered in
            sorted order.
        where: their source, for error messages.
        names: of all the classes in order, where they are known and the values are words.

    Raises:
        UserError: labels that are missing, negative, not whole numbers, or of both kinds.
    """
    missing = sum(_is_missing(value) for value in values)
    if missing:
        first = next(value for value in values if _is_missing(value))
        raise UserError(
            f"{where} holds {first!r}, no label, for {missing:,} of {len(values):,} images; "
            f"--no-labels leaves all labels out"
        )
    if all(isinstance(value, str) for value in values):
        known = list(names or sort_class_names(values))
        if names is None and all(_is_number(word) for word in known):
            # A table of text holds numbers as words.
            return number_labels([int(value.partition(".")[0]) for value in values], where)
        for word in known:
            _check_name(word, where)
        places = {word: number for number, word in enumerate(known)}
        return ImageLabels([places[value] for value in values], len(known), known, where)
    numbers = []
    for value in values:
        whole = isinstance(value, float) and value.is_integer()
        if not (type(value) is int or whole):
            raise UserError(
                f"{where} holds {value!r}, no label; labels are whole numbers or words, and "
                f"--no-labels leaves them out"
            )
        numbers.append(int(value))
    bad = next((n for n in numbers if not 0 <= n < LARGEST_CLASS), None)
    if bad is not None:
        count = sum(not 0 <= n < LARGEST_CLASS for n in numbers)
        raise UserError(
            f"{where}: labels are 0 to {LARGEST_CLASS - 1:,} (got {bad}, {count:,} such of "
            f"{len(numbers):,}); --no-labels leaves them out"
        )
    found = ImageLabels(numbers, max(numbers) + 1, None, where)
    used = len(set(numbers))
    if used < found.classes:
        found.notes.append(
            f"{where}: {found.classes - used:,} of the numbers 0 to {found.classes - 1:,} are no "
            f"image's label; they count as classes"
        )
    return found


def counts(labels: Iterable[int], classes: int) -> list[int]:
    """How many images each class has."""
    found = Counter(labels)
    return [found[number] for number in range(classes)]


def folders_note(folders: Iterable[str]) -> str:
    """The note that images lie in folders which are not taken as classes."""
    names = sort_class_names(folders)
    return (
        f"the images lie in {len(names):,} folders ({first_few(names)}), which are not taken as "
        "classes; --labels takes them, in a new folder"
    )


def first_few(words: Sequence[str]) -> str:
    """The first three words, and dots for the others."""
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,200}(\.0*)?", word) is not None


def _check_name(word: str, where: str) -> None:
    refuse_control(word, where)
    if len(word) > _LONGEST_NAME:
        raise UserError(
            f"{where}: a label of {len(word):,} letters ({word[:40]!r}...) names no class; "
            f"--no-labels leaves them out"
        )
