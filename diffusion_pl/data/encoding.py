"""Token states of captions by a frozen encoder, each different caption once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from diffusion_pl.text import Encoder
from diffusion_pl.texts import Captions, MemoryStates, TextTable, compact

# Captions encoded at a time, fewer of which all states would take more bytes.
_MOST, _LEAST, _BYTES = 1024, 64, 64 * 1024**2


def text_table(captions: Captions, encoder: Encoder) -> TextTable:
    """Encode captions into memory.

    Args:
        captions: of the images of a set.
        encoder: frozen.

    Raises:
        UserError: token states that float16 can't hold.
    """
    words = [*(captions[number] for number in range(len(captions))), ""]
    states = [each for each, _ in states_of(words, encoder)]
    return TextTable(
        encoder=encoder.name,
        digest=encoder.digest,
        width=encoder.width,
        length=encoder.length,
        captions=captions,
        states=MemoryStates(states),
    )


def batch_size(encoder: Encoder) -> int:
    """Captions to encode at a time, a function of length and width alone."""
    return max(_LEAST, min(_MOST, _BYTES // (2 * encoder.length * encoder.width)))


def states_of(
    words: Sequence[str], encoder: Encoder
) -> Iterator[tuple[npt.NDArray[np.float16], bool]]:
    """The states (T, E) of each caption, and whether it was cut to the length.

    Args:
        words: captions, of which so many are encoded at a time that their padding takes little
            memory.
        encoder: frozen.
    """
    step = batch_size(encoder)
    for first in range(0, len(words), step):
        around = words[first : first + step]
        encoded = encoder.encode(around)
        for place, caption in enumerate(around):
            states = compact(encoded.tokens[place], encoded.mask[place], caption)
            yield states, place in encoded.cut
