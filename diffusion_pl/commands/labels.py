"""A class on the command line: its name or its index."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence

from diffusion_pl.errors import UserError
from diffusion_pl.names import shown

_NEAREST = 5


def class_of(
    word: str | int | None, names: Sequence[str], classes: int, option: str = "--label"
) -> int | None:
    """The index of the class that a word names.

    Args:
        word: an index, which takes precedence, or a name; None: no class was named.
        names: of the classes in order; empty where the run's data had none.
        classes: number of the model's classes.
        option: that named it, for messages.

    Returns:
        The index, which may be out of range, or None.

    Raises:
        UserError: no class, or several, have this name.
    """
    if word is None:
        return None
    text = str(word)
    same = [index for index, name in enumerate(names) if name == text]
    if re.fullmatch(r"-?[0-9]+", text):
        index = int(text)
        if same and same != [index] and 0 <= index < len(names):
            print(
                shown(
                    f"{option} {text}: taken as the index, of class {names[index]!r}; the class "
                    f"called {text!r} is index {same[0]}"
                ),
                file=sys.stderr,
            )
        return index
    if len(same) == 1:
        return same[0]
    if same:
        raise UserError(f"{option} {text}: {len(same)} classes have this name; give the index")
    if not classes:
        raise UserError(f"{option} {text}: the model has no classes; leave it out")
    if not names:
        raise UserError(
            f"{option} {text}: the run has no names of its classes; give the index, 0 to "
            f"{classes - 1}"
        )
    by_case = {name.casefold(): name for name in names}
    near = [
        by_case[each]
        for each in difflib.get_close_matches(text.casefold(), by_case, _NEAREST, cutoff=0.4)
    ]
    if len(names) <= _NEAREST:
        near = list(dict.fromkeys([*near, *names]))
    known = ", ".join(near or [*names[:_NEAREST], "..."])
    raise UserError(
        f"{option} {text}: no class of that name among {len(names):,}; nearest: {known}; an index, "
        f"0 to {classes - 1}, is taken too"
    )
