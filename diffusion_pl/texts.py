"""Captions of images and the token states that a frozen encoder gives them, read by image."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion_pl.errors import UserError

Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Captions:
    """The captions of N images; each of the U different ones is stored once.

    Args:
        words: bytes of UTF-8, a caption and a line feed each, numbered from 0.
        lines: int64 (U + 1,), the byte where each begins, and the length of `words`.
        starts: int64 (N + 1,), where each image's part of `numbers` begins, and its length.
        numbers: uint32 (M,), captions of the images, one image after the other.
    """

    words: npt.NDArray[np.uint8]
    lines: Ints
    starts: Ints
    numbers: Ints

    @classmethod
    def of(cls, images: Iterable[Sequence[str]]) -> Captions:
        """Number captions in the order of their first appearance.

        Args:
            images: the captions of each image, none of them empty or with a line feed.
        """
        known: dict[str, int] = {}
        numbers: list[int] = []
        starts = [0]
        for captions in images:
            numbers += [known.setdefault(each, len(known)) for each in captions]
            starts.append(len(numbers))
        encoded = [f"{each}\n".encode() for each in known]
        return cls(
            np.frombuffer(b"".join(encoded), dtype=np.uint8),
            np.cumsum([0, *map(len, encoded)], dtype=np.int64),
            np.array(starts, dtype=np.int64),
            np.array(numbers, dtype=np.uint32),
        )

    def __len__(self) -> int:
        """How many different captions there are."""
        return len(self.lines) - 1

    def __getitem__(self, number: int) -> str:
        """A caption by its number."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        first, end = int(self.lines[number]), int(self.lines[number + 1])
        return self.words[first : end - 1].tobytes().decode()

    def of_image(self, image: int) -> tuple[str, ...]:
        """The captions of an image."""
        first, end = int(self.starts[image]), int(self.starts[image + 1])
        return tuple(self[int(number)] for number in self.numbers[first:end])

    def chosen(self, images: Ints, choice: npt.NDArray[np.float64]) -> Ints:
        """The number of one caption an image, -1 for an image without.

        Of k captions the one at floor(choice * k) is taken.

        Args:
            images: (n,), each in [0, N).
            choice: (n,), each in [0, 1).
        """
        first, counts = self.starts[images], self.starts[images + 1] - self.starts[images]
        place = first + np.floor(choice * counts).astype(np.int64)
        found = np.full(len(images), -1, dtype=np.int64)
        there = counts > 0
        found[there] = self.numbers[place[there]]
        return found

    def files(self) -> dict[str, bytes]:
        """What is stored: the words, and each array as a .npy file, by name."""
        arrays = {"lines": self.lines, "starts": self.starts, "numbers": self.numbers}
        return {"captions.txt": self.words.tobytes()} | {
            f"{name}.npy": _array_file(array) for name, array in arrays.items()
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the files."""
        return captions_fingerprint(
            {name: hashlib.sha256(data).hexdigest() for name, data in self.files().items()}
        )


def captions_fingerprint(digests: Mapping[str, str]) -> str:
    """sha256 (hex) of captions by the sha256 of each of their files."""
    return hashlib.sha256(json.dumps(dict(digests), sort_keys=True).encode()).hexdigest()


def _array_file(array: Ints) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


class States(Protocol):
    """Token states by caption."""

    def read(self, numbers: Sequence[int], /) -> Sequence[npt.NDArray[np.float16]]:
        """(T, E) of each caption; the number after the last one gives those of ""."""
        ...


def padded(
    states: Sequence[npt.NDArray[np.float16]], length: int, width: int
) -> tuple[Tensor, Tensor]:
    """A batch of token states.

    Args:
        states: (T, E) of each caption.
        length: L, at least any T.
        width: E.

    Returns:
        float16 (n, L, E), zero where there is no token, and bool (n, L), True where there is one.
    """
    text = torch.empty((len(states), length, width), dtype=torch.float16)
    array = text.numpy()
    for row, each in enumerate(states):
        tokens = len(each)
        array[row, :tokens] = each
        array[row, tokens:] = 0
    counts = torch.tensor([len(each) for each in states], dtype=torch.int64)
    return text, torch.arange(length) < counts[:, None]


class MemoryStates:
    """Token states in memory.

    Args:
        states: (T, E) of each caption in order, then of "".
    """

    def __init__(self, states: Sequence[npt.NDArray[np.float16]]) -> None:
        self._rows = np.concatenate(states)
        self._starts = np.cumsum([0, *map(len, states)]).tolist()

    def read(self, numbers: Sequence[int]) -> list[npt.NDArray[np.float16]]:
        """(T, E) of each caption."""
        return [self._rows[self._starts[each] : self._starts[each + 1]] for each in numbers]


@dataclass(frozen=True, eq=False)
class TextTable:
    """Captions and token states of a data set; see `images.Texts`.

    Args:
        encoder: its name.
        digest: sha256 (hex) of its weights.
        width: E, numbers a token.
        length: L, tokens that a caption is padded or was cut to.
        captions: of the images.
        states: of the captions.
    """

    encoder: str
    digest: str
    width: int
    length: int
    captions: Captions
    states: States

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of encoder, length and captions."""
        return table_fingerprint(self.digest, self.width, self.length, self.captions.fingerprint)

    @property
    def null(self) -> tuple[Tensor, Tensor]:
        """The encoding of "": float16 (L, E) and bool (L,)."""
        text, mask = self._padded([len(self.captions)])
        return text[0], mask[0]

    def captions_of(self, image: int) -> tuple[str, ...]:
        """The captions of an image."""
        return self.captions.of_image(image)

    def caption(self, image: int, choice: float) -> str:
        """The caption that `read` takes; "" for an image without."""
        [number] = self.captions.chosen(np.array([image]), np.array([choice]))
        return "" if number < 0 else self.captions[int(number)]

    def read(self, images: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Token states of one caption an image.

        Args:
            images: int64 (n,), each in [0, N).
            choice: float64 (n,) in [0, 1); of an image's k captions the one at floor(choice * k).

        Returns:
            float16 (n, L, E), zero where there is no token, and bool (n, L), True where there is
            one: nowhere for an image without captions.

        Raises:
            UserError: stored states that are damaged.
        """
        return self._padded(self.captions.chosen(images.numpy(), choice.numpy()).tolist())

    def _padded(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        there = iter(self.states.read([number for number in numbers if number >= 0]))
        none = np.empty((0, self.width), dtype=np.float16)
        found = [next(there) if number >= 0 else none for number in numbers]
        return padded(found, self.length, self.width)


def table_fingerprint(digest: str, width: int, length: int, captions: str) -> str:
    """sha256 (hex) of what determines token states: the encoder, the length, the captions."""
    return hashlib.sha256(json.dumps([digest, width, length, captions]).encode()).hexdigest()


def compact(tokens: Tensor, mask: Tensor, caption: str) -> npt.NDArray[np.float16]:
    """The states of one caption without its padding.

    Args:
        tokens: (L, E).
        mask: bool (L,), True where there is a token.
        caption: for the error.

    Returns:
        (T, E) float16, T at least 1 but for "".

    Raises:
        UserError: no token, or states that float16 can't hold.
    """
    kept = tokens[mask].to(torch.float16)
    missing = caption and not len(kept)
    if missing or not bool(kept.isfinite().all()):
        problem = "are none" if missing else "are not finite in float16"
        raise UserError(f"the encoder's token states of {caption[:80]!r} {problem}; take another")
    return kept.numpy()
