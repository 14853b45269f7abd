"""Captions of a source: what of a file, field or cell is a caption, and how it is kept.

Nothing that a stranger wrote here stops a preparation; what is left out or changed is counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from diffusion_pl.data.files import CONTROL, Files
from diffusion_pl.data.sources.base import digest_of
from diffusion_pl.errors import UserError
from diffusion_pl.names import listed

LARGEST = 1024**2  # bytes of a file or cell with captions of one image
LONGEST = 4096  # bytes of a caption
MOST = 100  # captions an image

# Names of fields and columns that are taken where none is named.
LIKE_CAPTIONS = ("caption", "captions", "text", "texts")

LOOKED = 100  # .json files of which the fields are looked for them; images may have none

_ASKING = "--captions, --caption or --encode"

# In the place of captions that were not read.
TOO_LARGE, NO_JSON = object(), object()

_EMPTY = "empty, left out"
_LARGE = f"in files or cells of more than {LARGEST:,} bytes, left out"
_BROKEN = "in .json that is not JSON, left out"
_FOREIGN = "no words, left out"
_CODE = "not UTF-8, left out"
_CONTROLS = "with control characters, taken as spaces"
_LONG = f"of more than {LONGEST:,} bytes, cut there"
_MANY = f"beyond the first {MOST:,} of an image, left out"


class CaptionReader(Protocol):
    """Random access to the captions of a source, from any process that has a copy."""

    @property
    def listing(self) -> str:
        """Digest (hex) of where the captions are, or of the captions."""

    def read(self, index: int, /) -> list[Any]:
        """What a source has as captions of an image: bytes of files, words, lists of words."""


@dataclass(frozen=True)
class CaptionSource:
    """Where the captions of a source are.

    Args:
        reader: of what is there.
        origin: in words.
    """

    reader: CaptionReader
    origin: str


@dataclass(frozen=True)
class Listed:
    """Captions that a table gives, in memory.

    Args:
        values: of each image.
    """

    values: list[list[Any]]

    @property
    def listing(self) -> str:
        """Digest (hex) of the captions."""
        return digest_of(map(repr, self.values))

    def read(self, index: int) -> list[Any]:
        """The captions of an image."""
        return self.values[index]


@dataclass(frozen=True)
class Beside:
    """Captions in files beside the images.

    Args:
        files: to read from.
        places: of each image, the names of files and the fields of those that are JSON.
    """

    files: Files
    places: list[list[tuple[str, str | None]]]

    @property
    def listing(self) -> str:
        """Digest (hex) of the names."""
        return digest_of(self.places)

    def read(self, index: int) -> list[Any]:
        """The contents of the files of an image."""
        found: list[Any] = []
        for name, field in self.places[index]:
            large = self.files.size(name) > LARGEST
            found.append(TOO_LARGE if large else content(self.files.read(name), field))
        return found


def content(data: bytes, field: str | None) -> Any:
    """What a file of captions holds: its bytes, or a field of its JSON."""
    if field is None:
        return data
    fields = fields_of(data)
    return NO_JSON if fields is None else fields.get(field)


def fields_of(data: bytes) -> dict[str, Any] | None:
    """The fields of a JSON object; {} for other JSON, None for what is none."""
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else {}


def cleaned(values: Sequence[Any], problems: Counter[str]) -> list[str]:
    """The captions of an image, each a line of printable UTF-8 without spaces around it.

    Every line of a file is a caption. Control characters are taken as spaces, and all spaces
    between two words as one.

    Args:
        values: as a `CaptionReader` gives them.
        problems: counts what was left out or changed, by its kind in words.
    """
    found: list[str] = []
    for text in _texts(values, problems):
        caption = " ".join(CONTROL.sub(" ", text).split())
        try:
            data = caption.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
            problems[_CODE] += 1
            continue
        if not caption:
            problems[_EMPTY] += 1
            continue
        if len(found) == MOST:
            problems[_MANY] += 1
            continue
        if any(CONTROL.match(sign) for sign in text if not sign.isspace()):
            problems[_CONTROLS] += 1
        if len(data) > LONGEST:
            problems[_LONG] += 1
            caption = data[:LONGEST].decode(errors="ignore").rstrip()
        found.append(caption)
    return found


def _texts(values: Iterable[Any], problems: Counter[str]) -> Iterator[str]:
    for value in values:
        if value is TOO_LARGE or value is NO_JSON:
            problems[_LARGE if value is TOO_LARGE else _BROKEN] += 1
        elif isinstance(value, bytes):
            yield from _lines(value, problems)
        elif isinstance(value, str):
            yield value
        elif isinstance(value, list):
            for each in value:
                if isinstance(each, str):
                    yield each
                else:
                    problems[_FOREIGN] += 1
        elif value is not None:
            problems[_FOREIGN] += 1


def _lines(data: bytes, problems: Counter[str]) -> Iterator[str]:
    if b"\0" in data:  # such as UTF-16, parts of which would pass
        problems[_CODE] += 1
        return
    for line in data.removeprefix(b"\xef\xbb\xbf").splitlines():
        if line.strip():
            try:
                yield line.decode()
            except UnicodeDecodeError:
                problems[_CODE] += 1


def absent(path: str, known: Sequence[str]) -> UserError:
    """The error where captions are wanted and none are found.

    Args:
        path: of the source.
        known: what `--caption` could name there.
    """
    if not known:
        return UserError(f"{path}: has no captions; leave out what asks for them: {_ASKING}")
    return UserError(
        f"{path}: has no captions by their usual names ({', '.join(LIKE_CAPTIONS)}, .txt); say by "
        f"--caption which of these they are: {listed(known)}; or leave out what asks for them: "
        f"{_ASKING}"
    )


def refuse_empty(source: CaptionSource, images: int, path: str) -> None:
    """Refuse a source in which no image has a caption, before anything is written.

    Looks until the first caption, which mostly is that of the first image.

    Raises:
        UserError: says what was there instead.
    """
    problems: Counter[str] = Counter()
    if any(cleaned(source.reader.read(index), problems) for index in range(images)):
        return
    said = f" ({'; '.join(f'{n:,} {kind}' for kind, n in problems.items())})" if problems else ""
    raise UserError(
        f"{path}: {source.origin}: holds no caption of any of the {images:,} images{said}; see "
        f"--caption, or leave out what asks for captions: {_ASKING}"
    )


def caption_notes(problems: Counter[str], bare: int, images: int) -> list[str]:
    """Notes on captions for the user.

    Args:
        problems: as `cleaned` counts them.
        bare: images without a caption.
        images: of the set.
    """
    notes = [f"captions: {count:,} {kind}" for kind, count in sorted(problems.items())]
    if bare:
        notes.append(f"captions: {bare:,} of {images:,} images have none")
    return notes
