"""Names of runs, data sets and classes: which may be made, and how any is shown.

A name goes into folders, job scripts, commands to be typed again, tables and terminals, each of
which takes some signs for commands. So names that we make are plain, and names that we read, which
others have made, are shown with every such sign written out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from diffusion_pl.errors import UserError

# What shells, make, SLURM's file names, globs and rich take for more than a sign.
_SIGNS = frozenset("'\"`$&;|<>()*?!~#{}[]\\^%/")
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# As in jack-o'-lantern, and/or, crane (bird).
_IN_WORDS = re.compile(r"(?<=\w)['/](?=[\w-])|(?<= )\((?=\w)|(?<=\w)\)$")
_LONGEST = 200  # file systems take 255 bytes


def unfit(name: str) -> str | None:
    """Why a name is not plain, as the end of an error line; None where it is.

    Letters and digits of any script, spaces and . _ - , + = @ : are plain.
    """
    if not name or name in (".", "..") or name != name.strip():
        return f"is empty, a dot, or has spaces around it (got {shown(name)!r})"
    if name.startswith("-"):
        return f"begins like an option (got {shown(name)})"
    hidden = next((sign for sign in name if not sign.isprintable()), None)
    if hidden is not None:
        return f"holds a sign that is not seen, {shown(hidden)} (got {shown(name)})"
    sign = next((sign for sign in name if sign in _SIGNS), None)
    if sign is not None:
        return f"holds {sign}, which shells and others take for a command (got {name})"
    if len(name.encode()) > _LONGEST:
        return f"is longer than {_LONGEST} bytes"
    return None


def refuse_name(name: str, where: str, instead: str) -> None:
    """See that a name that is about to be made is plain.

    Args:
        name: of a run or data set.
        where: for the message.
        instead: what to do, for the message.

    Raises:
        UserError: it is not.
    """
    problem = unfit(name)
    if problem is not None:
        raise UserError(f"{where}: {problem}; {instead}")


def refuse_class_names(names: Iterable[str], where: str, *, written: bool) -> None:
    """See that the names of classes are plain.

    Args:
        names: of the classes.
        where: for the message.
        written: in a table, in words that may have more signs, as jack-o'-lantern; not folders.

    Raises:
        UserError: names the first that is not.
    """
    for name in names:
        problem = unfit(_IN_WORDS.sub("", name) if written else name)
        if problem is not None:
            raise UserError(f"{where}: the name of a class {problem}; rename it, or --no-labels")


def plain(name: str) -> str:
    """A name that others have made, with _ for every sign that is not plain."""
    kept = "".join("_" if sign in _SIGNS or not sign.isprintable() else sign for sign in name)
    kept = kept.strip().lstrip("-")
    return "_" if kept in ("", ".", "..") else kept


def shown(text: str, keep: str = "") -> str:
    r"""A text for a terminal: what is not seen, or steers it, stands as \x1b, \u202e, ...

    Args:
        text: any.
        keep: signs that stay, such as the ends of lines.
    """
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign in keep else sign.encode("unicode_escape").decode()
        for sign in text
    )


def refuse_controls(word: str, where: str) -> None:
    """See that a word of the command line holds nothing that steers a terminal or ends a line.

    Raises:
        UserError: it does.
    """
    bad = next((s for s in word if ord(s) < 32 or 127 <= ord(s) < 160 or s in _BIDI), None)
    bad = bad or next((sign for sign in word if sign in "\u2028\u2029"), None)
    if bad is not None:
        raise UserError(
            f"{where}: holds {shown(bad)}, which is not seen and steers a terminal (got "
            f"{shown(word)}); leave it out"
        )
