"""A run's weights as one safetensors file, with the resolved config as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.interop.files import MOST_JSON, read_safetensors
from diffusion_pl.io.files import write_atomically

KEY = "diffusion_pl"


def write(path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a denoiser's weights.

    Args:
        path: the file, written whole or not at all; its folder is made if absent.
        state: the denoiser's state dict.
        about: `config`, the resolved one, and what else is to be known of the weights.

    Raises:
        UserError: the folder cannot be written or is full.
    """
    whole = {key: value.contiguous() for key, value in state.items()}
    # save_file makes a file that its owner alone may read, and this one is to be handed on.
    content = save(whole, metadata={"format": "pt", KEY: json.dumps(about)})
    write_atomically(path, lambda file: file.write(content))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read such a file; nothing in it is run.

    Returns:
        What is known of the weights, with `config`, and the denoiser's state dict.

    Raises:
        UserError: unreadable, or a safetensors file of others.
    """
    try:
        words, state = read_safetensors(path)
        if len(words.get(KEY, "")) > MOST_JSON:
            raise UserError(f"its config is larger than {MOST_JSON:,} bytes")
        about = json.loads(words[KEY])
        config, images = about["config"], about.get("images", 0)
        if not isinstance(config, dict) or type(images) is not int or images < 0:
            raise UserError("its config or images are none")
        return {**about, "images": images}, state
    except KeyError as error:
        raise UserError(
            f"{path}: holds no config of diffusion_pl; import it by the layout that it has"
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from error
