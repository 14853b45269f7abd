"""Names of runs, data sets and classes: which are allowed, and how they are printed.

Names go into paths, job scripts, commands, tables and terminals, each of which treats some
characters as commands. So new names must be plain, and names that were read are printed with
control characters escaped.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from diffusion_pl.errors import UserError

# Characters with a meaning to shells, make, SLURM, globs or rich.
_SIGNS = frozenset("'\"`$&;|<>()*?!~#{}[]\\^%/")
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# As in jack-o'-lantern, and/or, crane (bird).
_IN_WORDS = re.compile(r"(?<=\w)['/](?=[\w-])|(?<= )\((?=\w)|(?<=\w)\)$")
_LONGEST = 200  # file systems take 255 bytes
_LISTED, _LONGEST_LISTED = 12, 60  # names, and characters of each, in a message


def unfit(name: str) -> str | None:
    """Why a name is not plain, as the end of an error message; None where it is.

    Letters and digits of any script, spaces and . _ - , + = @ : are plain.
    """
    if not name or name in (".", "..") or name != name.strip():
        return f"is empty, a dot, or has spaces around it (got {shown(name)!r})"
    if name.startswith("-"):
        return f"begins like an option (got {shown(name)})"
    hidden = next((sign for sign in name if not sign.isprintable()), None)
    if hidden is not None:
        return f"contains an invisible character, {shown(hidden)} (got {shown(name)})"
    sign = next((sign for sign in name if sign in _SIGNS), None)
    if sign is not None:
        return f"contains {sign}, which shells and others treat as a command (got {name})"
    if len(name.encode()) > _LONGEST:
        return f"is longer than {_LONGEST} bytes"
    return None


def refuse_name(name: str, where: str, instead: str) -> None:
    """Raise UserError, `where: problem; instead`, for a new name that is not plain."""
    problem = unfit(name)
    if problem is not None:
        raise UserError(f"{where}: {problem}; {instead}")


def refuse_class_names(names: Iterable[str], where: str, *, written: bool) -> None:
    """Raise UserError for the first name of a class that is not plain.

    Args:
        names: of the classes.
        where: for the message.
        written: in a table, where ' / and () are allowed within words; otherwise folders.
    """
    for name in names:
        problem = unfit(_IN_WORDS.sub("", name) if written else name)
        if problem is not None:
            raise UserError(f"{where}: the name of a class {problem}; rename it, or --no-labels")


def plain(name: str) -> str:
    """A name with _ for every character that is not plain."""
    kept = "".join("_" if sign in _SIGNS or not sign.isprintable() else sign for sign in name)
    kept = kept.strip().lstrip("-")
    return "_" if kept in ("", ".", "..") else kept


def shown(text: str, keep: str = "") -> str:
    r"""Escape the unprintable characters of a text, as \x1b or \u202e, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign in keep else sign.encode("unicode_escape").decode()
        for sign in text
    )


def refuse_controls(word: str, where: str) -> None:
    """Raise UserError for a word of the command line with control characters or line ends."""
    bad = next((s for s in word if ord(s) < 32 or 127 <= ord(s) < 160 or s in _BIDI), None)
    bad = bad or next((sign for sign in word if sign in "\u2028\u2029"), None)
    if bad is not None:
        raise UserError(
            f"{where}: contains the control character {shown(bad)} (got "
            f"{shown(word)}); leave it out"
        )


def there_are(word: str, known: Iterable[str]) -> str:
    """The end of an error on a word that names nothing: what there is, and the nearest of it.

    Args:
        word: as it was written.
        known: what it could have named, in order.
    """
    names = list(dict.fromkeys(known))
    if not names:
        return ""
    by_lower = {each.lower(): each for each in names}
    near = difflib.get_close_matches(word.lower(), list(by_lower), 1)
    meant = f"; did you mean {_short(by_lower[near[0]])!r}?" if near else ""
    return f"; there are: {listed(names)}{meant}"


def listed(names: Sequence[str]) -> str:
    """Names with commas between, the first of many, those of strangers made harmless."""
    more = ", ..." if len(names) > _LISTED else ""
    return ", ".join(map(_short, names[:_LISTED])) + more


def _short(name: str) -> str:
    return shown(name if len(name) <= _LONGEST_LISTED else f"{name[:_LONGEST_LISTED]}...")
