"""The configuration as plain containers, the origin of each value, and the errors about it."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from diffusion_pl.addresses import credential_in, instead
from diffusion_pl.errors import UserError

# Far above any experiment, far below what exhausts the stack or the memory.
MAX_DEPTH = 32
MAX_VALUES = 10_000


# What a value set on the command line gives as its file: make train SET="optimizer.lr=1e-4".
OVERRIDE = "SET"


class ConfigError(UserError):
    """An error in a config: `<file>: <dotted key>: <what is wrong> (got ...); <what to do>`."""


@dataclass(frozen=True)
class Config:
    """A resolved experiment: plain dicts, lists and scalars, and the file behind every key.

    `file` is the experiment's own file. `origins` maps a dotted key to the file that set it and
    everything below it, where that is not the file that set its parent. `packages` is None for a
    user's own YAML, which may name anything; for an untrusted file, the packages, callables,
    addresses and folders that are trusted by name, besides the parts of this package. `typed` maps
    the dotted key of an override to its text on the command line.
    """

    name: str
    file: str
    tree: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] | None = None
    typed: Mapping[str, str] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """Name the file that set a dotted key, or its nearest ancestor."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key, self.file)

    def error(self, key: str, what: str) -> ConfigError:
        """Put the file and the key in front of what is wrong."""
        return ConfigError(f"{self.origin(key)}: {key}: {what}")

    def sources(self, key: str) -> str:
        """Every file that set a part of a node, and what was typed for it: `a.yaml + SET k=v`."""
        node = self.get(key)
        keys = [key, *(join(key, name) for name in names(node))]
        files = dict.fromkeys(self.origin(each) for each in keys)
        inside = [text for each, text in self.typed.items() if f"{each}.".startswith(f"{key}.")]
        said = {OVERRIDE: " ".join([OVERRIDE, *inside])}
        return " + ".join(said.get(file, file) for file in files)

    def get(self, key: str) -> Any:
        """Look a dotted key up; a number in it is an index of a list.

        Raises:
            ConfigError: there is no such key.
        """
        node: Any = self.tree
        done = ""
        for part in key.split("."):
            name = step(node, part)
            if name is None:
                raise self.error(join(done, part), f"missing{nearest(part, names(node))}")
            node = node[name]
            done = join(done, part)
        return node


def join(key: str, name: object) -> str:
    """Lengthen a dotted key by one name or index."""
    return f"{key}.{name}" if key else str(name)


def names(node: object) -> Iterable[object]:
    """List what a dotted key may continue with below a node; nothing below a scalar."""
    if isinstance(node, dict):
        return list(node)
    return range(len(node)) if isinstance(node, list) else ()


def step(node: object, part: str) -> Any:
    """Find the key or index that a part of a dotted key means; None when there is none."""
    by_text = {str(name): name for name in names(node)}
    return by_text.get(part)


def is_near(name: str, known: Iterable[object]) -> bool:
    """Tell whether a name may be one of the known ones, misspelt."""
    return bool(difflib.get_close_matches(name.lower(), [str(each).lower() for each in known]))


def nearest(
    name: object, known: Iterable[object], count: int = 1, former: Mapping[str, str] | None = None
) -> str:
    """End an error line with the likeliest names, or with all there are.

    Args:
        name: what was written.
        known: what could have been meant.
        count: how many suggestions at most.
        former: former names, each with its current name.

    Returns:
        `; did you mean 'x'?`, or `; known: a, b, c` when none is near, or nothing.
    """
    by_lower = {str(each).lower(): str(each) for each in known}
    meant = {**{old.lower(): new for old, new in (former or {}).items()}, **by_lower}
    close = difflib.get_close_matches(str(name).lower(), list(meant), n=count)
    if close:
        return "; did you mean " + " or ".join(repr(meant[each]) for each in close) + "?"
    listed = sorted(by_lower.values())[:12]
    rest = ", ..." if len(by_lower) > len(listed) else ""
    return f"; known: {', '.join(listed)}{rest}" if listed else ""


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Walk a tree to its scalars and empty containers, each with its dotted key."""
    children: Iterable[tuple[object, Any]] = ()
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    if not children or not node:
        yield key, node
        return
    for name, child in children:
        yield from leaves(child, join(key, name))


def plain(tree: object, file: str) -> dict[str, Any]:
    """Copy a tree, making sure that it holds only what YAML and a checkpoint can hold.

    Raises:
        ConfigError: not a mapping, a key or value of another type, too deep or too large.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"{file}: must be a mapping of sections (got a {type(tree).__name__}); "
            "write `network: ...`, `data: ...`"
        )
    if not tree:
        raise ConfigError(f"{file}: is empty; write `defaults: base` and what differs from it")
    count = itertools.count(1)

    def copied(node: Any, key: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ConfigError(f"{file}: {key}: nested more than {MAX_DEPTH} deep; flatten it")
        if next(count) > MAX_VALUES:
            raise ConfigError(f"{file}: {key}: more than {MAX_VALUES} values; keep data in files")
        if isinstance(node, Mapping):
            for name in node:
                if isinstance(name, bool) or not isinstance(name, str | int) or "." in str(name):
                    raise ConfigError(
                        f"{file}: {join(key, name)}: a key must be a word without dots, or an "
                        f"integer (got {name!r}); nest mappings instead"
                    )
            return {name: copied(child, join(key, name), depth + 1) for name, child in node.items()}
        if isinstance(node, list):
            return [copied(child, join(key, i), depth + 1) for i, child in enumerate(node)]
        if node is not None and type(node) not in (bool, int, float, str):
            raise ConfigError(
                f"{file}: {key}: must be a number, text, true, false, null, a list or a mapping "
                f"(got {type(node).__name__})"
            )
        return node

    return copied(tree, "", 0)


def check_storable(config: Config) -> Config:
    """Refuse what would not survive being written and read again, and hand the config back.

    Raises:
        ConfigError: a value left open as ???, a ${...} that was not resolved, or a credential.
    """
    for key, value in leaves(config.tree):
        if value == "???":
            raise config.error(key, "has no value (got '???'); set it")
        if isinstance(value, str) and (found := credential_in(value)):
            raise config.error(
                key, f"holds {found}, which the run would keep; set {instead(value)}"
            )
        if isinstance(value, str) and "${" in value:
            raise config.error(key, f"holds an interpolation (got {value!r}); write the value")
    return config


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Compare two resolved trees, for a run resumed under a changed config.

    Returns:
        Lines such as `optimizer.lr: 0.001 -> 0.0001`, in the order of the old tree, then of the
        new one; `absent` stands for a key that the other side has not.
    """
    before = {key: json.dumps(value, ensure_ascii=False) for key, value in leaves(dict(old))}
    after = {key: json.dumps(value, ensure_ascii=False) for key, value in leaves(dict(new))}
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in before | after
        if before.get(key) != after.get(key)
    ]


def dump(config: Config) -> str:
    """Write the resolved tree as YAML that OmegaConf reads back to an equal tree."""
    return OmegaConf.to_yaml(OmegaConf.create(config.tree))
