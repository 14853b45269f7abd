"""Values of a config that others wrote, of the type and size that they must have.

Each names the key when it refuses; nothing is rounded, cut or put in another's place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffusion_pl.errors import UserError

# What any network that was published stays far below.
LEVELS, WIDEST = 16, 2**16


def whole(
    config: Mapping[str, Any], key: str, usual: Any, least: int = 1, most: int = WIDEST
) -> int:
    """A whole number between two limits.

    Args:
        config: the file's keys.
        key: to look at.
        usual: what it is when left out; of another type, it must be there.
        least: smallest value.
        most: largest value.

    Raises:
        UserError: it is none, or outside.
    """
    value = config.get(key, usual)
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{key}: must be a whole number from {least:,} to {most:,} {got(value)}")
    return value


def real(config: Mapping[str, Any], key: str, usual: float, most: float = math.inf) -> float:
    """A positive finite number.

    Raises:
        UserError: it is none, or above `most`.
    """
    value = config.get(key, usual)
    if type(value) not in (int, float) or not 0 < value <= most or not math.isfinite(value):
        raise UserError(f"{key}: must be a positive number {got(value)}")
    return float(value)


def flag(config: Mapping[str, Any], key: str, usual: bool) -> bool:
    """True or false.

    Raises:
        UserError: it is neither.
    """
    value = config.get(key, usual)
    if type(value) is not bool:
        raise UserError(f"{key}: must be true or false {got(value)}")
    return value


def choice(config: Mapping[str, Any], key: str, usual: Any, known: Mapping[Any, Any]) -> Any:
    """What a word stands for.

    Raises:
        UserError: the word is not known; names those that are.
    """
    value = config.get(key, usual)
    try:
        return known[value]
    except (KeyError, TypeError) as error:
        words = ", ".join(map(str, known))
        raise UserError(f"{key}: must be one of {words} {got(value)}") from error


def only(config: Mapping[str, Any], key: str, usual: Any, ours: Any) -> None:
    """Refuse a key that is not what our parts do.

    Raises:
        UserError: it is something else.
    """
    value = config.get(key, usual)
    if type(value) is bool is not type(ours) or value != ours:
        raise UserError(f"{key}: must be {ours!r} {got(value)}")


def several(config: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """One value a level.

    Raises:
        UserError: it is no list of them, or longer than any network has levels.
    """
    value = config.get(key)
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= LEVELS:
        raise UserError(f"{key}: must be a list of 1 to {LEVELS} values {got(value)}")
    for one in value:
        if type(one) is not kind or (isinstance(one, int) and not 1 <= one <= WIDEST):
            raise UserError(f"{key}: must be a list of {kind.__name__} {got(value)}")
    return list(value)


def got(value: Any) -> str:
    """A value of others as the end of a line, however long it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = type(value).__name__
    return f"(got {text if len(text) <= 80 else text[:80] + ' ...'})"
