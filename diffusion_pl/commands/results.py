"""What a command has found: a JSON object for programs, a few lines for a person at a terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_pl.names import shown


def add(part: argparse.ArgumentParser) -> None:
    """How the result is asked for."""
    part.add_argument(
        "--json", action="store_true", help="the result as JSON on a terminal too, as in a pipe"
    )


def for_people(options: argparse.Namespace) -> bool:
    """Whether stdout is a terminal, and nobody asks for JSON there."""
    return sys.stdout.isatty() and not options.json


def tell(
    options: argparse.Namespace,
    result: Mapping[str, Any],
    lines: Iterable[tuple[str, str]],
    indent: int | None = None,
) -> None:
    """Print the result on stdout.

    Args:
        options: of the command; `json` asks for it on a terminal.
        result: all of it.
        lines: what of it a person wants to see, as (title, text); none where stderr has told it.
        indent: of the JSON.
    """
    if for_people(options):
        for title, text in lines:
            print(shown(f"{title:8} {text}"), flush=True)
    else:
        print(json.dumps(result, indent=indent), flush=True)
