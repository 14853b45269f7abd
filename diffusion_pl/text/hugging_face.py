"""Text encoders of the transformers library: T5's encoder, CLIP's text model, Qwen and the like.

A token is a last hidden state: of a model of text and images the text model's, of an encoder with a
decoder the encoder's. Weights are read from safetensors alone, and by transformers' own classes
alone: code that a repository brings is never run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small, regular
from diffusion_pl.text.encoders import HUGGING_FACE, Encoder, TokenEncoder

INSTALL = "pip install 'diffusion_pl[hf]'"
LENGTH, CLIP_LENGTH = 128, 77
BATCH = 8  # captions at a time; one prompt takes as long
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt")  # neither pickles nor code
_MOST_INDEX = 50_000_000  # bytes
_BLOCK = 2**24
OWN_CODE = {"local_files_only": True, "trust_remote_code": False}


def load(name: str, length: int | None = None, device: torch.device | str = "cpu") -> Encoder:
    """Load an encoder, in the precision that its weights have.

    Args:
        name: "hf:" and a folder or a name of the hub.
        length: L; None: 77 for CLIP, 128 for others, or all positions where they are fewer.
        device: where it computes.

    Raises:
        UserError: transformers is not installed; the model cannot be had, or needs code of its
            own; weights that are incomplete or in other files than safetensors; a length beyond
            its positions.
    """
    transformers = library()
    folder = folder_of(name)
    files = weight_files(folder, name)
    with loading(transformers, name):
        config = transformers.AutoConfig.from_pretrained(folder, **OWN_CODE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **OWN_CODE)
        network = _network(transformers, config, folder, name).to(device)
    inner = network.config
    positions = getattr(inner, "max_position_embeddings", None) or 2**20
    usual = CLIP_LENGTH if inner.model_type.startswith("clip") else LENGTH
    length = min(usual, positions) if length is None else length
    if not 2 <= length <= positions:
        raise UserError(f"{name}: length must be from 2 to {positions} tokens (got {length})")
    return TokenEncoder(
        name=name,
        digest=digest(files),
        width=inner.hidden_size,
        length=length,
        ids=Tokens(tokenizer, name),
        states=States(network),
        batch=BATCH,
    )


class Tokens:
    """A tokenizer of transformers, cut on the right.

    Args:
        tokenizer: changed in place.
        name: of the encoder, for messages.

    Raises:
        UserError: it has no token for an empty caption.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer = tokenizer
        tokenizer.truncation_side = "right"
        # A decoder's tokenizer adds no special tokens.
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self.empty: list[int] = [token for token in known if token is not None][:1]
        if not self("", None):
            raise UserError(f"{name}: its tokenizer has no token for an empty caption")

    def __call__(self, caption: str, length: int | None) -> list[int]:
        """The ids of a caption, special tokens included."""
        cut = {} if length is None else {"truncation": True, "max_length": length}
        ids: list[int] = self.tokenizer(caption, verbose=False, **cut)["input_ids"]
        return ids or self.empty


class States:
    """Last hidden states of a network of transformers.

    Args:
        network: in evaluation mode.
    """

    def __init__(self, network: Any) -> None:
        self.network = network.eval().requires_grad_(False)

    def __call__(self, ids: Tensor) -> Tensor:
        """int64 (B, l) -> (B, l, E)."""
        found: Tensor = self.network(input_ids=ids.to(self.network.device)).last_hidden_state
        return found


def library() -> ModuleType:
    """transformers.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"transformers is not installed; {INSTALL}") from error
    return transformers


def folder_of(name: str, *, fetch: bool = True) -> Path:
    """The folder of a model: as named, else the hub's snapshot in its cache.

    Args:
        name: "hf:" and a folder or a name of the hub.
        fetch: fetch what is not in the cache.

    Raises:
        UserError: no such folder, and the hub, or its cache, does not give it.
    """
    place = name.removeprefix(HUGGING_FACE)
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or place.startswith((".", "~")) or place.count("/") > 1:
        raise UserError(f"{name}: there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(place, allow_patterns=list(_PATTERNS), local_files_only=not fetch)
    except Exception as error:  # of the hub's library and of those below it
        if not fetch:
            raise UserError(
                f"{name}: is no folder, and not in the hub's cache; run hf download {place}"
            ) from error
        raise UserError(
            f"{name}: is no folder, and cannot be had from the hub ({_line(error)}); fetch it "
            "where there is a network and name the folder"
        ) from error
    return Path(found)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model, by name.

    Raises:
        UserError: there are none, or the index names other files.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        names = set(json.loads(read_small(folder / INDEX, _MOST_INDEX))["weight_map"].values())
        files = [folder / each for each in sorted(names)]
    except FileNotFoundError:
        raise UserError(f"{name}: has no {WEIGHTS}; only safetensors are read") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: {INDEX} cannot be read ({_line(error)})") from error
    for file in files:
        if file.parent != folder or file.suffix != ".safetensors" or not file.is_file():
            raise UserError(f"{name}: {INDEX} names {file.name!r}, which is no safetensors there")
    return files


def digest(files: Sequence[Path]) -> str:
    """sha256 (hex) of files one after another; of one file, its own."""
    found = hashlib.sha256()
    for path in files:
        with regular(path).open("rb") as file:
            while block := file.read(_BLOCK):
                found.update(block)
    return found.hexdigest()


@contextlib.contextmanager
def loading(transformers: ModuleType, name: str) -> Iterator[None]:
    """Load without progress bars and reports, and with one line for whatever goes wrong.

    Raises:
        UserError: any error of transformers.
    """
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: cannot be loaded ({_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def whole(kind: Any, folder: Path, name: str, **options: Any) -> Any:
    """A network of transformers, whose weights the folder has every one of.

    Raises:
        UserError: weights that are missing or of another shape, which transformers would draw.
    """
    network, told = kind.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, **OWN_CODE, **options
    )
    missing = [key for key in told["missing_keys"] if not key.startswith("pooler.")]
    unfit = sorted(missing) + sorted(str(each) for each in told["mismatched_keys"])
    if unfit:
        raise UserError(f"{name}: its weights do not have {unfit[0]}")
    return network


def _network(transformers: ModuleType, config: Any, folder: Path, name: str) -> Any:
    kinds = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    if config.model_type == "clip":
        kind, config = transformers.CLIPTextModel, config.text_config
    elif config.model_type in kinds:
        kind = transformers.AutoModelForTextEncoding
    else:
        kind = transformers.AutoModel
    config.is_encoder_decoder = False  # the encoder alone
    return whole(kind, folder, name, config=config, dtype="auto")


def _line(error: Exception) -> str:
    """An error's message in one line, of moderate length."""
    return " ".join(str(error).split())[:300]
