"""The result of a command: JSON for programs, a few lines for a person at a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_pl.names import shown


def line(title: str, text: object) -> str:
    """A line of output for people."""
    return f"{title:8} {text}"


@dataclass(frozen=True)
class Result:
    """The result of a command.

    Args:
        values: the JSON object.
        lines: for people; None: every string and number of `values`.
        after: printed last, on stderr, such as what to type next.
        code: exit code.
        in_pipes: print the lines also without a terminal, unless JSON is asked for.
        indent: of the JSON.
    """

    values: Mapping[str, Any]
    lines: Sequence[str] | None = None
    after: Sequence[str] = ()
    code: int = 0
    in_pipes: bool = False
    indent: int | None = None

    def tell(self, as_json: bool) -> None:
        """Print it, with `as_json` as JSON on a terminal, too."""
        if (sys.stdout.isatty() or self.in_pipes) and not as_json:
            lines = self.lines
            if lines is None:
                plain = {
                    key: v for key, v in self.values.items() if isinstance(v, (str, int, float))
                }
                lines = [line(key.replace("_", " "), value) for key, value in plain.items()]
            for each in lines:
                print(shown(each), flush=True)
        elif self.values:
            print(json.dumps(self.values, indent=self.indent), flush=True)
        for each in self.after:
            print(shown(each), file=sys.stderr)
