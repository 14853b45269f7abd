"""Labels as sources write them, numbers or words, become classes from 0 on."""

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

# A column or a field that may hold labels where none is called `label`.
LIKE_LABELS = re.compile(r"(.*_)?(label|class|category|target)s?(_?(id|idx|index|name))?", re.I)


@dataclass
class Numbered:
    """Classes of images.

    Args:
        labels: of each image, in [0, classes).
        classes: how many.
        names: of the classes in order; None where the source has only numbers.
        source: what they were read from.
        notes: what the user should know of them.
    """

    labels: list[int]
    classes: int
    names: list[str] | None
    source: str
    notes: list[str] = field(default_factory=list)


def in_order(words: Iterable[str]) -> list[str]:
    """Names of classes in the order of their numbers: 2 before 10 where all are numbers."""
    every = set(words)
    if all(word.isascii() and word.isdecimal() for word in every):
        return sorted(every, key=lambda word: (int(word), word))
    return sorted(every)


def numbered(values: Sequence[Any], where: str, names: Sequence[str] | None = None) -> Numbered:
    """Number labels.

    Args:
        values: whole numbers, as such or as floats, which stay what they are; or words, which are
            numbered in order.
        where: names their source in a complaint.
        names: of all the classes in order, where the values are words and it is known.

    Raises:
        UserError: labels that are missing, negative, no whole numbers, or of both kinds.
    """
    missing = sum(_is_missing(value) for value in values)
    if missing:
        first = next(value for value in values if _is_missing(value))
        raise UserError(
            f"{where} holds {first!r}, no label, for {missing:,} of {len(values):,} images; "
            f"--no-labels leaves all labels out"
        )
    if all(isinstance(value, str) for value in values):
        known = list(names or in_order(values))
        if names is None and all(_is_number(word) for word in known):
            # A table of text holds numbers as words.
            return numbered([int(value.partition(".")[0]) for value in values], where)
        for word in known:
            _check_name(word, where)
        places = {word: number for number, word in enumerate(known)}
        return Numbered([places[value] for value in values], len(known), known, where)
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
    found = Numbered(numbers, max(numbers) + 1, None, where)
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
