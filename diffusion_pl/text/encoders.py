"""What a text encoder is, and the one that a name stands for.

A batch holds captions of equal length and has a fixed size, so no padding enters the network and
the encoding of a caption depends on that caption alone: what is stored with the data, the prompt of
a sample and the null come out equal to the bit on the same machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion_pl.errors import UserError

HUGGING_FACE = "hf:"


class Encoded(NamedTuple):
    """Token states of n captions.

    Args:
        tokens: float16 (n, L, E), on the CPU; 0 where there is no token.
        mask: bool (n, L), True where there is a token, which are the first of a row.
        cut: indices of the captions of more than L tokens, whose end is missing.
    """

    tokens: Tensor
    mask: Tensor
    cut: tuple[int, ...]


class Encoder(Protocol):
    """A frozen network from captions to token states."""

    @property
    def name(self) -> str:
        """As given to `encoder`."""

    @property
    def digest(self) -> str:
        """sha256 of its weights, 64 hex digits."""

    @property
    def width(self) -> int:
        """E, numbers of a token."""

    @property
    def length(self) -> int:
        """L, tokens that a caption is padded or cut to."""

    def encode(self, captions: Sequence[str]) -> Encoded:
        """Token states of captions; those of "" are the null.

        Raises:
            UserError: states that float16 cannot hold.
        """

    def kept(self, caption: str) -> str:
        """The words of a caption that its L tokens hold: all of them if it is not cut."""


@dataclass(frozen=True)
class TokenEncoder:
    """A tokenizer and a network.

    Args:
        name, digest, width, length: see `Encoder`.
        ids: the tokens of a caption, special ones included, cut to a length of at least 2 or, for
            None, however many; never empty.
        states: int64 (B, l) on the CPU to last hidden states (B, l, E), without padding.
        batch: B, captions at a time.
    """

    name: str
    digest: str
    width: int
    length: int
    ids: Callable[[str, int | None], list[int]]
    states: Callable[[Tensor], Tensor]
    batch: int = 32

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Encoded:
        """See `Encoder`."""
        if isinstance(captions, str):
            raise UserError(f"{self.name}: encodes a list of captions (got one string)")
        tokens = torch.zeros(len(captions), self.length, self.width, dtype=torch.float16)
        mask = torch.zeros(len(captions), self.length, dtype=torch.bool)
        of_length = defaultdict(list)
        cut = []
        for index, caption in enumerate(captions):
            ids = self.ids(caption, None)
            if len(ids) > self.length:
                cut.append(index)
                ids = self.ids(caption, self.length)
            of_length[len(ids)].append((index, ids))
        for length, group in of_length.items():
            for first in range(0, len(group), self.batch):
                indices, ids = map(list, zip(*group[first : first + self.batch], strict=True))
                filling = ids[-1:] * (self.batch - len(ids))
                states = self.states(torch.tensor(ids + filling))[: len(ids)]
                tokens[indices, :length] = states.to("cpu", torch.float16)
                mask[indices, :length] = True
        if not torch.isfinite(tokens).all():
            raise UserError(f"{self.name}: its states are beyond float16; take another encoder")
        return Encoded(tokens, mask, tuple(cut))

    def kept(self, caption: str) -> str:
        """See `Encoder`."""
        words = caption.split()
        if len(self.ids(caption, None)) <= self.length:
            return caption
        low, high = 0, len(words) - 1
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(self.ids(" ".join(words[:middle]), None)) <= self.length
            low, high = (middle, high) if fits else (low, middle - 1)
        return " ".join(words[:low])


def encoder(name: str, length: int | None = None, *, device: torch.device | str = "cpu") -> Encoder:
    """Load an encoder.

    Args:
        name: "minilm", or "hf:" and a folder or a name of the Hugging Face hub: T5's encoder,
            CLIP's text model, or a decoder such as Qwen's.
        length: L, tokens that a caption is padded or cut to, special ones included, at least 2;
            None: 32 for MiniLM, 77 for CLIP, 128 for others.
        device: where the network computes.

    Raises:
        UserError: an unknown name, a length beyond the network's, a package that is not installed
            (with the line that installs it), or weights that are absent or other than expected.
    """
    if length is not None and length < 2:
        raise UserError(f"{name}: length must be at least 2 tokens (got {length})")
    if name == "minilm":
        from diffusion_pl.text import minilm

        return minilm.load(length, device)
    if name.startswith(HUGGING_FACE) and name != HUGGING_FACE:
        from diffusion_pl.text import hugging_face

        return hugging_face.load(name, length, device)
    raise UserError(f"unknown text encoder {name!r}; take minilm, or hf: and a folder or hub name")
