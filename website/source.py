"""Links of the documentation to source files and to the names in them."""

from __future__ import annotations

import ast
import functools
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

# [text](../a/file.ext)
LINK = re.compile(r"\[(?P<text>[^\]\n]*)\]\((?P<up>(?:\.\./)+)(?P<path>[\w./-]+\.[a-z]+)\)")
NAME = re.compile(r"`([A-Za-z_][\w.]*)`")


@functools.cache
def lines(path: Path) -> dict[str, int]:
    """The line, from 1, of every name of a module; a class's members as Class.name."""
    found: dict[str, int] = {}

    def take(body: list[ast.stmt], within: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                found.setdefault(within + node.name, first)
                if isinstance(node, ast.ClassDef):
                    take(node.body, f"{within}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        found.setdefault(within + target.id, node.lineno)

    take(ast.parse(path.read_text()).body, "")
    return found


def linked(page: str, match: re.Match[str]) -> str | None:
    """The file of the repository, by its path, that a link of a page leads to; None for a page.

    Args:
        page: path below docs/.
        match: of `LINK`.
    """
    path = posixpath.normpath(posixpath.join("docs", page, "..", match["up"] + match["path"]))
    return None if path.startswith("docs/") else path


def named(text: str, path: str) -> str | None:
    """The name that a link's text stands for: all of it in backticks, of a Python file."""
    match = NAME.fullmatch(text)
    if match is None or not path.endswith(".py") or match[1].endswith(".py"):
        return None
    return match[1]


def line_of(path: str, name: str) -> int:
    """Where a name stands in a file of the repository.

    Args:
        path: below the repository's root.
        name: of a function, class or constant; Class.member.

    Raises:
        KeyError: the file has no such name.
    """
    found = lines(ROOT / path)
    if name not in found:
        raise KeyError(f"{path}: has no {name}; it has {', '.join(found)}")
    return found[name]
