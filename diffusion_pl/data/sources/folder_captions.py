"""Captions in a folder or a zip file of images: in a table, a COCO file, or files beside images."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from diffusion_pl.data.files import LARGEST_FILE, Files
from diffusion_pl.data.labels import first_few
from diffusion_pl.data.metadata import METADATA, columns_named, folders_above, json_of, rows_of
from diffusion_pl.data.sources.captions import (
    LARGEST,
    LIKE_CAPTIONS,
    LOOKED,
    Beside,
    CaptionSource,
    Listed,
    fields_of,
)
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small
from diffusion_pl.names import shown, there_are

# Files of captions as COCO names them: captions_train2017.json.
_COCO = re.compile(r"captions?[-_ ]?.*\.json", re.IGNORECASE)


@dataclass
class FolderCaptions:
    """The captions of a folder of images.

    Args:
        source: of the captions; None where there are none.
        read: the files that hold them.
        columns: those of metadata.csv or metadata.jsonl.
        notes: for the user.
    """

    source: CaptionSource | None = None
    read: set[str] = field(default_factory=set)
    columns: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_captions(
    path: str, files: Files, others: Sequence[str], images: Sequence[str], spec: str | None
) -> FolderCaptions:
    """Find the captions of a folder's images.

    Args:
        path: of the folder or zip file.
        files: to read from.
        others: names of the files that are no images.
        images: names of the images.
        spec: columns of metadata.csv or metadata.jsonl, endings of files beside the images,
            `json.FIELD` or the path of a COCO file, with commas between; None takes the first that
            is there: a table's usual columns, .txt, a usual field of .json, a COCO file.

    Raises:
        UserError: nothing of what is named, or a damaged table.
    """
    there = set(others)
    if spec is not None:
        words = [word for each in spec.split(",") if (word := each.strip())]
        return _named(path, files, there, images, words)
    table = _table(files, there, images)
    if table is not None:
        like = [each for each in LIKE_CAPTIONS if each in table.columns][:1]
        if like:
            return table.captions(images, like)
    found = _beside(images, there, "txt", None)
    if found is None:
        fields = _fields_beside(files, images, there)
        like = [each for each in LIKE_CAPTIONS if each in fields]
        found = _beside(images, there, "json", like[0]) if like else None
    if found is not None:
        return _joined(files, [found], images)
    return _all_coco(files, others, images)


def _named(
    path: str, files: Files, there: set[str], images: Sequence[str], words: Sequence[str]
) -> FolderCaptions:
    """Captions in what the user names, which is of one kind."""
    if len(words) == 1 and words[0].lower().endswith(".json"):
        name = words[0]
        inside = name in there
        data = files.read(name) if inside else _outside(path, name)
        captions = _coco(data, name)
        if captions is None:
            raise UserError(f"{name}: no COCO file of captions (no images and annotations in it)")
        values, notes = _of(captions, name if inside else "", images)
        if not any(values) and not notes:
            raise UserError(
                f"{name}: names none of the {len(images):,} images of {path} (it has "
                f"{first_few([*map(shown, captions)])}; there are {first_few(images)})"
            )
        read = {name} if inside else set()
        return FolderCaptions(CaptionSource(Listed(values), name), read, notes=notes)
    table = _table(files, there, images)
    if table is not None and set(words) <= set(table.columns):
        return table.captions(images, words)
    places = []
    columns = () if table is None else table.columns
    for word in sorted(words, key=lambda word: word in columns):  # what is none is told first
        named = word[5:] if word.lower().startswith("json.") else None
        found = _beside(images, there, "json" if named else word.lower(), named)
        if found is None or (
            named is not None and named not in _fields(files, (each[0] for each in found if each))
        ):
            raise UserError(
                f"{path}: --caption {word} is no column of {' or '.join(METADATA)}, no ending of "
                f"files beside the images and no field of their .json"
                f"{there_are(word, offered(files, there, images))}"
            )
        places.append(found)
    return _joined(files, places, images)


def offered(files: Files, others: Iterable[str], images: Sequence[str]) -> list[str]:
    """What `--caption` could name: columns, endings beside images, fields, COCO files."""
    there = set(others)
    table = _table(files, there, images)
    stems = {str(PurePosixPath(image).with_suffix("")) for image in images}
    places = [PurePosixPath(name) for name in sorted(there)]
    beside = [p.suffix[1:] for p in places if p.suffix and str(p.with_suffix("")) in stems]
    found = [*(() if table is None else table.columns), *beside]
    found += [f"json.{each}" for each in _fields_beside(files, images, there)]
    found += [str(each) for each in places if _COCO.fullmatch(each.name)]
    return [each for each in dict.fromkeys(found) if each != "json"]


def _outside(path: str, name: str) -> bytes:
    try:
        return read_small(Path(name), LARGEST_FILE)
    except OSError as error:
        raise UserError(
            f"{name}: neither in {path} nor on the disk ({error.strerror}); see --caption"
        ) from error


# Tables.


@dataclass(frozen=True)
class _Table:
    """metadata.csv or metadata.jsonl."""

    name: str
    start: str
    rows: list[dict[str, Any]]

    @cached_property
    def columns(self) -> list[str]:
        # Of all rows: those of .jsonl may leave out what an image has not.
        names = dict.fromkeys(each for row in self.rows for each in row)
        return [str(each) for each in names if each != "file_name"]

    def captions(self, images: Sequence[str], columns: Sequence[str]) -> FolderCaptions:
        """Captions of one image in one row or several, one column or several."""
        found: dict[str, list[Any]] = defaultdict(list)
        for row in self.rows:
            name = str(row.get("file_name")).replace("\\", "/")
            found[self.start + name] += [row.get(each) for each in columns]
        gone = len(found.keys() - set(images))
        where = f"{self.start}{self.name}"
        notes = [f"{where} names {gone:,} files that are not here"] if gone else []
        origin = f"{columns_named([*map(repr, columns)])} of {where}"
        values = [found.get(image, []) for image in images]
        return FolderCaptions(CaptionSource(Listed(values), origin), {where}, list(columns), notes)


def _table(files: Files, there: set[str], images: Sequence[str]) -> _Table | None:
    """The outermost table that names files."""
    for start in folders_above(images[0]):
        for name in METADATA:
            if start + name in there:
                rows = list(rows_of(files.read(start + name), start + name))
                if rows and "file_name" in rows[0]:
                    return _Table(name, start, rows)
    return None


# Files beside the images.

_Places = list[tuple[str, str | None] | None]


def _beside(
    images: Sequence[str], there: set[str], ending: str, named: str | None
) -> _Places | None:
    """The file of an ending beside each image; None where no image has one."""
    names = [str(PurePosixPath(image).with_suffix(f".{ending}")) for image in images]
    if not there.intersection(names):
        return None
    return [(name, named) if name in there else None for name in names]


def _joined(files: Files, found: list[_Places], images: Sequence[str]) -> FolderCaptions:
    places = [[each for each in row if each is not None] for row in zip(*found, strict=True)]
    kinds = dict.fromkeys((PurePosixPath(n).suffix, f) for row in places for n, f in row)
    origin = [f"{e} beside images" if f is None else f"field {f!r} of {e}" for e, f in kinds]
    read = {name for row in places for name, _ in row}
    return FolderCaptions(CaptionSource(Beside(files, places), ", ".join(origin)), read)


def _fields_beside(files: Files, images: Sequence[str], there: set[str]) -> list[str]:
    """The fields of the first .json files beside images."""
    names = (str(PurePosixPath(image).with_suffix(".json")) for image in images)
    return list(dict.fromkeys(_fields(files, islice((n for n in names if n in there), LOOKED))))


def _fields(files: Files, names: Iterable[str]) -> Iterator[str]:
    """The fields of .json files, one file after the other; large files have none."""
    for name in names:
        if files.size(name) <= LARGEST:
            yield from fields_of(files.read(name)) or {}


# COCO.


def _all_coco(files: Files, others: Sequence[str], images: Sequence[str]) -> FolderCaptions:
    """The captions of every COCO file that names one of the images; other files are passed over."""
    found = FolderCaptions()
    values: list[list[Any]] = [[] for _ in images]
    for name in others:
        if not _COCO.fullmatch(PurePosixPath(name).name):
            continue
        with suppress(UserError):
            captions = _coco(files.read(name), name) or {}
            own, notes = _of(captions, name, images)
            found.notes += notes
            if any(own):
                found.read.add(name)
                values = [[*before, *more] for before, more in zip(values, own, strict=True)]
    if found.read:
        found.source = CaptionSource(Listed(values), ", ".join(sorted(found.read)))
    return found


def _coco(data: bytes, name: str) -> dict[str, list[Any]] | None:
    """Captions by the name of a file; None for another kind of JSON."""
    parsed = json_of(data, name)
    if not isinstance(parsed, dict):
        return None
    images, annotations = parsed.get("images"), parsed.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        return None
    try:
        names = {each["id"]: str(each["file_name"]).replace("\\", "/") for each in images}
        found: dict[str, list[Any]] = {file: [] for file in names.values()}
        for each in annotations:
            if each["image_id"] in names:
                found[names[each["image_id"]]].append(each["caption"])
    except (TypeError, KeyError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{name}: not a COCO file of captions ({reason})") from error
    return found


def _of(
    captions: dict[str, list[Any]], name: str, images: Sequence[str]
) -> tuple[list[list[Any]], list[str]]:
    """The captions of each image by its path from the file's folder, or else by the end of it.

    Args:
        captions: by the name of an image.
        name: of the file, "" for one that lies elsewhere.
        images: their paths.

    Returns:
        The captions, none for images of which several end as a name does; and notes on those.
    """
    start = name[: name.rfind("/") + 1]
    below = [each[len(start) :] if each.startswith(start) else None for each in images]
    found = [each if each in captions else None for each in below]
    taken = set(found)
    for place, image in enumerate(images):
        if found[place] is None:
            end = next((end for end in _ends(image) if end in captions), None)
            found[place] = None if end in taken else end
    meant = Counter(found)
    shared = [each for each in found if each is not None and meant[each] > 1]
    notes = []
    if shared:
        notes = [
            f"{name or 'captions'}: {len(shared):,} images get no caption, as several end in the "
            f"same name, such as {shown(shared[0])}; write their paths as file_name"
        ]
    none: list[Any] = []
    values = [none if each is None or meant[each] > 1 else captions[each] for each in found]
    return values, notes


def _ends(image: str) -> list[str]:
    parts = image.split("/")
    return ["/".join(parts[place:]) for place in range(len(parts))]
