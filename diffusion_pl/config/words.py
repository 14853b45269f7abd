"""Words that YAML 1.1 misreads, such as 010, 16:1 and None, are refused; ~ and inf are expanded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import Any

import yaml

from diffusion_pl.config.tree import ConfigError

_INT = "tag:yaml.org,2002:int"
_NULL = "tag:yaml.org,2002:null"
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
# Nothing else needs the slow look at the single words of a text.
_SUSPICIOUS = re.compile(r"(?<![\w.])[-+]?0[0-9_]|\w:\w|\bNone\b")
_INFINITE = {"inf": math.inf, "+inf": math.inf, "-inf": -math.inf}


def refuse_misread(text: str, where: str) -> None:
    """Refuse words that YAML 1.1 does not take for what they look like, each with a sentence.

    Args:
        text: valid YAML, not deeply nested.
        where: in front of each line of the error.

    Raises:
        ConfigError: a line for each.
    """
    if not _SUSPICIOUS.search(text):
        return
    lines = text.count("\n") > 0
    found = [
        f"{where}: {f'line {node.start_mark.line + 1}: ' if lines else ''}{what}"
        for node, what in _misread(yaml.compose(text, Loader=yaml.SafeLoader), {})
    ]
    if found:
        raise ConfigError("\n".join(found))


def expand_values(value: Any, where: str) -> Any:
    """Expand a leading ~ and inf in the texts of a value.

    Args:
        value: plain containers, changed in place.
        where: in front of an error.

    Raises:
        ConfigError: the home folder of an unknown user.
    """
    if isinstance(value, dict):
        value.update({name: expand_values(child, where) for name, child in value.items()})
    elif isinstance(value, list):
        value[:] = [expand_values(child, where) for child in value]
    elif isinstance(value, str):
        if value in _INFINITE:
            return _INFINITE[value]
        return expand_home(value, where)
    return value


def expand_home(text: str, where: str) -> str:
    """Expand a leading ~, which a shell does not expand after `KEY=`.

    Raises:
        ConfigError: the home folder of an unknown user.
    """
    if not re.match(r"~[^/\s]*(/|$)", text):
        return text
    found = os.path.expanduser(text)
    if found == text:
        raise ConfigError(
            f"{where}: {text.partition('/')[0]} is nobody's home here (got {text!r}); "
            "write the whole path"
        )
    return found


def _misread(node: Any, seen: dict[int, Any]) -> Iterator[tuple[Any, str]]:
    """Every unquoted scalar that YAML misreads, with a sentence."""
    if node is None or id(node) in seen:  # an alias of a node that was checked
        return
    seen[id(node)] = node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if node.flow_style and _empty(value) and _joined(key):
                name, _, rest = key.value.partition(":")
                yield key, f"{key.value!r} is one word to YAML; write a space, {name}: {rest}"
            else:
                yield from _misread(key, seen)
            yield from _misread(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _misread(child, seen)
    elif node.style is None:
        text = node.value
        if text == "None":
            yield node, "None is a word to YAML, not nothing; write null"
        elif node.tag == _INT and _OCTAL.fullmatch(text):
            number = int(text.replace("_", ""), 8)
            plain = text.replace("0", "", 1)
            yield node, f"{text} is {number} to YAML, as octal; write {plain}, or '{text}' for text"
        elif node.tag == _INT and ":" in text:
            yield node, f"{text} is a number to base 60 to YAML; write it out, or '{text}' for text"


def _empty(node: Any) -> bool:
    return node.tag == _NULL and node.value == ""


def _joined(node: Any) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and ":" in node.value
