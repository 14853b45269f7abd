"""Prompts, encoded as the captions that a model was trained with."""

from __future__ import annotations

import hashlib
import json
import sys
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from diffusion_pl import text
from diffusion_pl.config.reading import EXPERIMENTS, packaged_experiments
from diffusion_pl.data.encoding import states_of
from diffusion_pl.errors import UserError
from diffusion_pl.images import ImageDataset, Texts
from diffusion_pl.io.files import regular
from diffusion_pl.names import shown
from diffusion_pl.texts import padded

MOST_BYTES = 2**24  # of a file of prompts
_TOGETHER = 64  # prompts that are encoded at a time, so that a few images need not all
_QUOTED = 40  # characters of a prompt in a message


@dataclass(frozen=True)
class TextEncoder:
    """The encoder of the captions that a model was trained with.

    Args:
        name: as `text.encoder` takes it.
        digest: sha256 (hex) of its weights.
        width: numbers a token.
        length: tokens that a caption is padded or cut to.
    """

    name: str
    digest: str
    width: int
    length: int

    @classmethod
    def of(cls, texts: Texts) -> TextEncoder:
        """That of the captions of a data set."""
        return cls(texts.encoder, texts.digest, texts.width, texts.length)

    def check(self, images: ImageDataset) -> None:
        """Refuse captions that another encoder encoded.

        Args:
            images: data with texts.

        Raises:
            UserError: names both digests.
        """
        texts = images.texts
        if texts is not None and texts.digest != self.digest:
            raise UserError(
                f"the model's captions were encoded by {self.name} (sha256 {self.digest[:12]}), "
                f"those of {images.name} by {texts.encoder} (sha256 {texts.digest[:12]}); encode "
                "them by the first"
            )

    def load(self, name: str | None = None) -> text.Encoder:
        """The encoder.

        Args:
            name: where it is now; its own name for None.

        Raises:
            UserError: it is not installed, or is not the one of the captions.
        """
        encoder = text.encoder(name or self.name, self.length)
        if encoder.digest != self.digest:
            raise UserError(
                f"the model's captions were encoded by {self.name} (sha256 {self.digest[:12]}), "
                f"and {encoder.name} here is another (sha256 {encoder.digest[:12]}); install the "
                "first, or say where it is: --encoder"
            )
        return encoder


@dataclass(frozen=True, eq=False)
class Prompts:
    """Given prompts: image i has number i modulo how many there are.

    Args:
        words: of each prompt.
        states: of each prompt.
        length: L, tokens that a prompt is padded to.
        width: E, numbers a token.
    """

    words: Sequence[str]
    states: PromptStates
    length: int
    width: int

    def condition(self, seed: int, indices: Sequence[int]) -> dict[str, Tensor]:
        """`text`, float16 (n, L, E), and `text_mask`, bool (n, L)."""
        states = self.states.read([i % len(self.words) for i in indices])
        tokens, mask = padded(states, self.length, self.width)
        return {"text": tokens, "text_mask": mask}

    def captions(self, seed: int, indices: Sequence[int]) -> tuple[str, ...]:
        """The prompt of each image."""
        return tuple(self.words[i % len(self.words)] for i in indices)

    def about(self) -> Mapping[str, Any]:
        """The prompt if it is the only one, else their number and digest."""
        if len(self.words) == 1:
            return {"prompt": self.words[0]}
        digest = hashlib.sha256(json.dumps(list(self.words)).encode()).hexdigest()
        return {"prompts": f"{len(self.words)} {digest[:12]}"}


class PromptStates:
    """Token states of prompts, encoded when they are first read.

    Args:
        words: at least one prompt.
        encoder: of the captions of the model.
    """

    def __init__(self, words: Sequence[str], encoder: text.Encoder) -> None:
        self.cut: dict[int, str] = {}
        self._words = words
        self._encoder = encoder
        self._blocks: dict[int, list[npt.NDArray[np.float16]]] = {}

    def read(self, numbers: Sequence[int]) -> list[npt.NDArray[np.float16]]:
        """(T, E) of each prompt; a line on stderr tells where one is cut, the first time."""
        return [self._block(each // _TOGETHER)[each % _TOGETHER] for each in numbers]

    def _block(self, at: int) -> list[npt.NDArray[np.float16]]:
        """The states of a block of prompts, always the same ones together."""
        if at not in self._blocks:
            first = at * _TOGETHER
            found = list(states_of(self._words[first : first + _TOGETHER], self._encoder))
            self._blocks[at] = [states for states, _ in found]
            for number, (_, is_cut) in enumerate(found, first):
                if is_cut:
                    self._tell_cut(number)
        return self._blocks[at]

    def _tell_cut(self, number: int) -> None:
        words = self._words[number]
        self.cut[number] = kept = self._encoder.kept(words)
        said = (
            f"cut after {_end_of(kept)!r}, at {len(kept):,} of {len(words):,} characters: "
            f"prompt {number + 1:,} has more than {self._encoder.length} tokens "
            f"({_start_of(words)!r})"
        )
        print(shown(said), file=sys.stderr)


def encoded(words: Sequence[str], encoder: text.Encoder) -> Prompts:
    """Prompts that are encoded as they are needed, some at a time.

    Args:
        words: at least one prompt.
        encoder: of the captions of the model.
    """
    return Prompts(tuple(words), PromptStates(tuple(words), encoder), encoder.length, encoder.width)


def _start_of(text: str) -> str:
    """The beginning of a prompt, for a message."""
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def _end_of(text: str) -> str:
    """The end of a prompt, for a message."""
    return text if len(text) <= _QUOTED else f"...{text[-_QUOTED:]}"


def located(name: str) -> Path:
    """The file of prompts that a config names: from the present folder, else the package's own.

    Args:
        name: such as experiments/synthetic_text.txt, which comes with that experiment.
    """
    path = Path(name)
    if path.parent == EXPERIMENTS and not path.exists():
        return packaged_experiments() / path.name
    return path


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts in a file, a line each; blank lines are passed over.

    Raises:
        UserError: it cannot be read, is not UTF-8, is larger than 16 MB, or has no prompt.
    """
    try:
        with regular(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > MOST_BYTES:  # before the last letter, which may be cut, is decoded
        raise UserError(f"{path}: is larger than {MOST_BYTES >> 20} MB; prompts are a line each")
    try:
        lines = [line.decode() for line in content.removeprefix(BOM_UTF8).splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; prompts are a line each") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise UserError(f"{path}: has no prompt; write one a line")
    return found
