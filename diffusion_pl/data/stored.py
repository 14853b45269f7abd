"""What a prepared data set says of its captions and their token states; torch is not needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffusion_pl.errors import UserError
from diffusion_pl.names import plain

TEXT = "text"  # the folder below that of the data set
ENCODINGS = f"{TEXT}/encodings.json"
STATES_INDEX = "index.npy"
_FORMAT = 1
NAMES = ("captions.txt", "lines.npy", "starts.npy", "numbers.npy")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredFile:
    """A file below the data set's folder.

    Args:
        file: its path there, with forward slashes.
        bytes: its size.
        sha256: hex.
    """

    file: str
    bytes: int
    sha256: str

    @property
    def problem(self) -> str | None:
        """What is wrong with the description; None for nothing."""
        if type(self.bytes) is not int or not 0 < self.bytes < 2**63:
            return f"bytes of {self.file} must be a whole number (got {self.bytes!r})"
        if not isinstance(self.sha256, str) or not _HEX.fullmatch(self.sha256):
            return f"the digest of {self.file} is not 64 hex digits"
        return None


@dataclass(frozen=True)
class CaptionFiles:
    """What `dataset.json` says of captions.

    Args:
        unique: different captions.
        total: captions of all images.
        bare: images without a caption.
        origin: what they were read from, in words.
        files: of NAMES, in order.
    """

    unique: int
    total: int
    bare: int
    origin: str
    files: list[StoredFile]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> CaptionFiles:
        """Read from JSON; raises TypeError, KeyError or AttributeError for other content."""
        files = [StoredFile(**each) for each in content["files"]]
        return cls(**{**content, "files": files})

    @property
    def problem(self) -> str | None:
        """The first value that is of a wrong type or leads elsewhere; None for none."""
        for name in ("unique", "total", "bare"):
            if type(number := getattr(self, name)) is not int or not 0 <= number < 2**63:
                return f"{name} of captions must be a whole number (got {number!r})"
        if not isinstance(self.origin, str):
            return "origin of captions must be words"
        if [each.file for each in self.files] != [f"{TEXT}/{name}" for name in NAMES]:
            return f"captions are other files than {', '.join(NAMES)}"
        return next((each.problem for each in self.files if each.problem), None)


@dataclass(frozen=True)
class Encoding:
    """The token states of all captions of a data set by one encoder.

    Args:
        encoder: its name.
        digest: sha256 (hex) of its weights.
        width: E, numbers a token.
        length: L, tokens that a caption was cut to.
        captions: fingerprint of the captions.
        cut: captions of more tokens, of which the first are kept.
        index: a row a caption, then one for "".
        blocks: float16 token states, one caption's after another's, without padding.
    """

    encoder: str
    digest: str
    width: int
    length: int
    captions: str
    cut: int
    index: StoredFile
    blocks: list[StoredFile]

    @property
    def folder(self) -> str:
        """Below that of the data set."""
        return folder_of(self.encoder, self.digest, self.length)

    @property
    def problem(self) -> str | None:
        """The first value that is of a wrong type or leads elsewhere; None for none."""
        for name, least in (("width", 1), ("length", 1), ("cut", 0)):
            if type(number := getattr(self, name)) is not int or not least <= number < 2**31:
                return f"{name} must be a whole number (got {number!r})"
        if not isinstance(self.encoder, str) or not self.encoder.isprintable():
            return f"the name of an encoder must be a word (got {self.encoder!r})"
        if not all(isinstance(e, str) and _HEX.fullmatch(e) for e in (self.digest, self.captions)):
            return "a digest that is not 64 hex digits"
        names = [STATES_INDEX, *(block_name(number) for number in range(len(self.blocks)))]
        files = [self.index, *self.blocks]
        if [each.file for each in files] != [f"{self.folder}/{name}" for name in names]:
            return f"files elsewhere than in {self.folder}"
        return next((each.problem for each in files if each.problem), None)


def folder_of(encoder: str, digest: str, length: int) -> str:
    """The folder of an encoding below that of the data set."""
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", plain(encoder)).strip("-.")[:80]
    return f"{TEXT}/{word}-{digest[:8]}-{length}"


def block_name(number: int) -> str:
    """The name of a file of token states."""
    return f"{number:06d}.f16"


def encodings_text(encodings: list[Encoding]) -> str:
    """The content of encodings.json."""
    content = {"format": _FORMAT, "encodings": [asdict(each) for each in encodings]}
    return json.dumps(content, indent=1) + "\n"


def read_encodings(data: bytes, where: str) -> list[Encoding]:
    """Read encodings.json.

    Args:
        data: the file.
        where: for the error.

    Raises:
        UserError: not as it is written.
    """
    try:
        content = json.loads(data)
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}, this program reads {_FORMAT}")
        found = []
        for each in content["encodings"]:
            files = {"index": StoredFile(**each["index"])}
            blocks = [StoredFile(**block) for block in each["blocks"]]
            found.append(Encoding(**{**each, **files, "blocks": blocks}))
            if problem := found[-1].problem:
                raise ValueError(problem)
        if len({each.encoder for each in found}) < len(found):
            raise ValueError("an encoder twice")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: not as `prepare --encode` writes it ({reason})") from error
    return found


def no_captions(where: str) -> str:
    """The error where a set without captions should have some."""
    return (
        f"{where}: was prepared without captions; prepare it again into a new folder from a source "
        f"that has some, by python -m diffusion_pl prepare SOURCE DEST --resolutions ... --captions"
    )
