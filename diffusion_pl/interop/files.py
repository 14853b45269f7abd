"""JSON and safetensors of others, read within limits; nothing in them is run."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.io.files import regular

# A config of 1,000 betas takes 30,000 bytes, a header of 10,000 tensors 2,000,000.
MOST_JSON, MOST_HEADER = 2**20, 2**23


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: unreadable, larger than a config is, or something else.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError("it is no regular file")
        with regular(path).open("rb") as file:
            text = file.read(MOST_JSON + 1)
        if len(text) > MOST_JSON:
            raise UserError(f"larger than {MOST_JSON:,} bytes, which no config is")
        found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must be a JSON object")
    return found


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The words of a safetensors file's header, and its tensors.

    Raises:
        UserError: unreadable, or with a header larger than any network has.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError("it is no regular file")
        with regular(path).open("rb") as opened:
            length = opened.read(8)
        # The library reads up to 100 MB of it, and a byte becomes an object of sixty.
        if len(length) == 8 and struct.unpack("<Q", length)[0] > MOST_HEADER:
            raise UserError(f"its header is larger than {MOST_HEADER:,} bytes")
        with safe_open(regular(path), framework="pt") as file:
            words = file.metadata() or {}
        return words, load_file(path)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from error
