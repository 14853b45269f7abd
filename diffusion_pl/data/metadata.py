"""Tables and JSON that lie beside images, such as metadata.csv and metadata.jsonl."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from diffusion_pl.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl")
_LARGEST_CELL = 1024**2


def folders_above(image: str) -> Iterator[str]:
    """The start of the paths of files beside or above an image, the outermost folder first."""
    for folder in reversed(PurePosixPath(image).parents):
        yield "" if str(folder) == "." else f"{folder}/"


def columns_named(names: Sequence[str]) -> str:
    """Columns of a table in words."""
    return f"{'column' if len(names) == 1 else 'columns'} {', '.join(names)}"


def rows_of(data: bytes, name: str) -> Iterable[dict[str, Any]]:
    """The rows of metadata.csv or metadata.jsonl.

    Raises:
        UserError: not a table.
    """
    text = text_of(data, name)
    if name.endswith(".csv"):
        csv.field_size_limit(_LARGEST_CELL)
        try:
            yield from csv.DictReader(io.StringIO(text, newline=""))
        except csv.Error as error:
            raise UserError(f"{name}: not a readable table ({error})") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = json_of(line.encode(), f"{name}:{number}")
            if not isinstance(row, dict):
                raise UserError(f"{name}:{number}: not a JSON object")
            yield row


def text_of(data: bytes, name: str) -> str:
    """Decode a file.

    Raises:
        UserError: not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 ({error.reason})") from error


def json_of(data: bytes, name: str) -> Any:
    """Parse a file.

    Raises:
        UserError: not JSON.
    """
    try:
        return json.loads(text_of(data, name))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON ({error})") from error
