"""What a prepared data set says of its captions; nothing here waits for torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT = "text"  # the folder below that of the data set
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
