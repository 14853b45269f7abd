"""References within one configuration: `${data.batch_size}` and nothing else in `${...}`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusion_pl.config.renaming import key_in
from diffusion_pl.config.tree import MAX_VALUES, Config, join, names, nearest, step

_REFERENCE = re.compile(r"\$\{([\w-]+(?:\.[\w-]+)*)\}")

# References to references: more than any experiment needs, few enough for the stack.
_MAX_CHAIN = 8


def interpolated(config: Config) -> dict[str, Any]:
    """Replace every reference by a copy of what it names.

    OmegaConf's own resolution would also run resolvers, and ${oc.env:...} would write a secret of
    the environment into the run folder and the checkpoint. It also expands without limit.

    Raises:
        ConfigError: another kind of ${...}, a name that is not there, a circle, an expansion
            beyond 10,000 values.
    """
    return _Expansion(config, itertools.count(1)).value(config.tree, "", ())


@dataclass(frozen=True)
class _Expansion:
    """The expansion of one configuration; `written` counts its values."""

    config: Config
    written: Iterator[int]

    def value(self, node: Any, key: str, chain: tuple[str, ...]) -> Any:
        """Copy a node with its references replaced; `chain` are the references that led here."""
        if next(self.written) > MAX_VALUES:
            raise self.config.error(key, f"references expand to more than {MAX_VALUES} values")
        if isinstance(node, dict):
            return {name: self.value(child, join(key, name), chain) for name, child in node.items()}
        if isinstance(node, list):
            return [self.value(child, join(key, i), chain) for i, child in enumerate(node)]
        return self.text(node, key, chain) if isinstance(node, str) and "${" in node else node

    def text(self, text: str, key: str, chain: tuple[str, ...]) -> Any:
        """Replace the references in a text; a text that is one reference becomes its value."""
        # Taking the references out first also finds a resolver put together from pieces.
        if "${" in _REFERENCE.sub("", text) or "\\${" in text:
            raise self.config.error(
                key,
                f"only ${{dotted.key}} can be interpolated (got {text!r}); write the value "
                "itself: nothing is read from the environment, it would be saved with the run",
            )
        if match := _REFERENCE.fullmatch(text):
            return self.referenced(match[1], key, chain)

        def written_out(match: re.Match[str]) -> str:
            value = self.referenced(match[1], key, chain)
            if isinstance(value, dict | list):
                raise self.config.error(
                    key, f"${{{match[1]}}} is not a single value; only those fit into a text"
                )
            return str(value)

        return _REFERENCE.sub(written_out, text)

    def referenced(self, name: str, key: str, chain: tuple[str, ...]) -> Any:
        """Look up what a reference names, through references on the way."""
        if name in chain or len(chain) == _MAX_CHAIN:
            path = " -> ".join((*chain, name))
            what = "refers to itself" if name in chain else f"more than {_MAX_CHAIN} references"
            raise self.config.error(key, f"{what} (got {path}); write the value")
        node: Any = self.config.tree
        done = ""
        for part in key_in(self.config.tree, name).split("."):
            if isinstance(node, str) and "${" in node:
                node = self.text(node, done, (*chain, name))
            found = step(node, part)
            if found is None:
                known = [join(done, each) for each in names(node)]
                raise self.config.error(
                    key, f"unknown key in ${{{name}}}{nearest(join(done, part), known)}"
                )
            node = node[found]
            done = join(done, part)
        return self.value(node, name, (*chain, name))
