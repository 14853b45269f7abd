"""What a command has found: a JSON object for programs, a few lines for a person at a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_pl.names import shown


def line(title: str, text: object) -> str:
    """A line for a person."""
    return f"{title:8} {text}"


@dataclass(frozen=True)
class Result:
    """What a command has found.

    Args:
        values: all of it, for JSON.
        lines: what of it a person wants to see; None: every value that is a word or a number.
        after: said last, on stderr: what to type next.
        code: the command's exit code.
        in_pipes: the lines in a pipe, too, unless JSON is asked for.
        indent: of the JSON.
    """

    values: Mapping[str, Any]
    lines: Sequence[str] | None = None
    after: Sequence[str] = ()
    code: int = 0
    in_pipes: bool = False
    indent: int | None = None

    def tell(self, as_json: bool) -> None:
        """Print it.

        Args:
            as_json: on a terminal too.
        """
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
