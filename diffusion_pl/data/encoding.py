"""Token states of captions by a frozen encoder, each different caption once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from diffusion_pl.texts import Captions, MemoryStates, TextTable, compact

BATCH = 64  # captions encoded at a time


class Encoded(Protocol):
    """Token states of n captions: (n, L, E), and bool (n, L), True where there is a token."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor: ...
    @property
    def cut(self) -> tuple[int, ...]: ...


class Encoder(Protocol):
    """A frozen encoder; see diffusion_pl.text."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def length(self) -> int: ...
    def encode(self, captions: Sequence[str], /) -> Encoded: ...


def text_table(captions: Captions, encoder: Encoder) -> TextTable:
    """Encode captions into memory.

    Args:
        captions: of the images of a set.
        encoder: frozen.

    Raises:
        UserError: token states that float16 can't hold.
    """
    states = [each for each, _ in states_of(captions, encoder, range(len(captions) + 1))]
    return TextTable(
        encoder=encoder.name,
        digest=encoder.digest,
        width=encoder.width,
        length=encoder.length,
        captions=captions,
        states=MemoryStates(states),
    )


def states_of(
    captions: Captions, encoder: Encoder, numbers: range
) -> Iterator[tuple[npt.NDArray[np.float16], bool]]:
    """The states (T, E) of each caption, and whether it was cut to the length.

    Args:
        captions: of a set.
        encoder: frozen.
        numbers: of the captions; the one after the last is "".
    """
    for first in range(numbers.start, numbers.stop, BATCH):
        around = range(first, min(first + BATCH, numbers.stop))
        words = [captions[number] if number < len(captions) else "" for number in around]
        encoded = encoder.encode(words)
        for place, caption in enumerate(words):
            states = compact(encoded.tokens[place], encoded.mask[place], caption)
            yield states, place in encoded.cut
