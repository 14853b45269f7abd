"""Originals in tables: an LSUN lmdb, or parquet files in the layout of Hugging Face.

lmdb and pyarrow come with `pip install 'diffusion_pl[prepare]'`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion_pl.data.files import LARGEST_FILE
from diffusion_pl.data.labels import LIKE_LABELS, ImageLabels, number_labels
from diffusion_pl.data.lmdb_reading import Child
from diffusion_pl.data.metadata import columns_named
from diffusion_pl.data.sources.base import Original, Originals, SourceSpec, digest_of, label_fields
from diffusion_pl.data.sources.captions import (
    LARGEST,
    LIKE_CAPTIONS,
    TOO_LARGE,
    CaptionSource,
    absent,
)
from diffusion_pl.data.splits import files_of_split
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import last_change, regular
from diffusion_pl.names import there_are

_LABELS = 1024  # rows read at a time
_LONGEST_LABEL = 1000  # bytes


def _absent(package: str, path: Path) -> str:
    return f"{path}: reading it takes {package}; pip install 'diffusion_pl[prepare]'"


@dataclass
class _LmdbReader:
    path: Path
    keys: list[bytes]
    # This process's id and the child that reads for it: a fork must not share the child.
    _opened: tuple[int, Child] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "keys": self.keys, "_opened": None}

    def read(self, index: int) -> Original:
        key = self.keys[index]
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), Child(self.path, LARGEST_FILE))
        try:
            data = self._opened[1].value(key)
        except ValueError:
            self._opened = None  # the next image may be sound
            raise
        return Original(key.decode("ascii", "backslashreplace"), data)


def open_lmdb(path: Path, name: str) -> Originals:
    """An LSUN category: image files by key, in the order of the keys, without labels.

    Args:
        path: data.mdb.
        name: of the set.

    Raises:
        UserError: lmdb is not installed, the file is no database or damaged, or no images.
    """
    try:
        import lmdb  # noqa: F401 - for the process that reads
    except ImportError as error:
        raise UserError(_absent("lmdb", path)) from error
    child = Child(path, LARGEST_FILE)
    try:
        keys = child.keys()
    finally:
        child.end()
    name = name.removesuffix("_lmdb").removesuffix("-data")
    return Originals(
        name,
        _LmdbReader(path, keys),
        len(keys),
        digest_of(keys),
        changed=np.full(len(keys), last_change(path)),
    )


@dataclass
class _ParquetReader:
    """Reads a row at a time, so that no more than one page of a file is in memory."""

    paths: list[Path]
    # First row of each row group over all files, and one past the last; its file and number there.
    starts: npt.NDArray[np.int64]
    groups: list[tuple[int, int]]
    # First row of each file.
    firsts: list[int]
    column: str
    # The row group, the next row of it, and the rows from there on.
    _kept: tuple[int, int, Iterator[Any]] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_kept": None}

    def read(self, index: int) -> Original:
        file, cell = self.cell(index)
        name = f"{self.paths[file].name}:{index - self.firsts[file]}"
        if _bytes_of(cell) > LARGEST_FILE:
            raise UserError(f"{self.paths[file]}: {name} is too large for an image")
        value = cell[0].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(value, dict) and value.get("path"):
            name = f"{name}:{value['path']}"
        if not isinstance(data, bytes):
            raise UserError(f"{self.paths[file]}: {name} is a path or nothing; embed the images")
        return Original(name, data)

    def cell(self, index: int) -> tuple[int, Any]:
        """The file of a row, and the row; those of its group before it are passed over."""
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        file, number = self.groups[group]
        row = index - int(self.starts[group])
        if self._kept is None or self._kept[0] != group or row < self._kept[1]:
            self._kept = (group, 0, _rows(self.paths[file], number, self.column))
        _, there, rows = self._kept
        self._kept = None
        for _ in range(row - there):
            next(rows)
        cell = next(rows)
        self._kept = (group, row + 1, rows)
        return file, cell


@dataclass(frozen=True)
class _ParquetCaptions:
    columns: list[_ParquetReader]

    @property
    def listing(self) -> str:
        return digest_of(each.column for each in self.columns)

    def read(self, index: int) -> list[Any]:
        cells = [each.cell(index)[1] for each in self.columns]
        return [TOO_LARGE if _bytes_of(cell) > LARGEST else cell[0].as_py() for cell in cells]


def _rows(path: Path, group: int, column: str) -> Iterator[Any]:
    """The cells of a row group's column, as arrays of one each.

    Raises:
        UserError: as `_opened`, or the column has more bytes than so many images have.
    """
    # Without threads of its own, whose locks a fork might have taken along.
    with _opened(path) as opened:
        metadata = opened.metadata.row_group(group)
        parts = (metadata.column(number) for number in range(metadata.num_columns))
        size = sum(
            part.total_uncompressed_size
            for part in parts
            if part.path_in_schema.partition(".")[0] == column
        )
        if size > LARGEST_FILE * max(1, metadata.num_rows):
            raise UserError(
                f"{path}: {metadata.num_rows:,} rows of column {column!r} have {size:,} bytes, "
                "more than images have"
            )
        batches = opened.iter_batches(1, row_groups=[group], columns=[column], use_threads=False)
        for batch in batches:
            yield batch.column(0)
    raise UserError(f"{path}: has fewer rows than it says; fetch it again")


def _bytes_of(cell: Any) -> int:
    """Bytes of the largest value in an array of binaries, strings, or structures of them."""
    from pyarrow import compute, types

    kind = cell.type
    if types.is_struct(kind):
        return max((_bytes_of(cell.field(number)) for number in range(kind.num_fields)), default=0)
    if types.is_dictionary(kind):
        return _bytes_of(cell.dictionary)
    if types.is_list(kind) or types.is_large_list(kind):
        return _bytes_of(cell.flatten()) * max(1, len(cell.flatten()))
    tests = (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string)
    if any(test(kind) for test in tests):
        return compute.max(compute.binary_length(cell)).as_py() or 0
    return 0


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A parquet file.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(_absent("pyarrow", path)) from error
    try:
        with parquet.ParquetFile(regular(path)) as opened:
            yield opened
    except (pyarrow.ArrowException, OSError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{path}: damaged or not a parquet file ({line})") from error


def open_parquet(files: Sequence[Path], name: str, spec: SourceSpec) -> Originals:
    """Tables whose rows hold an image file's bytes, alone or as {bytes, path}, and maybe a label.

    Args:
        files: in order; rows in the order of the files.
        name: of the set.
        spec: with the columns of the images, where there are several, and of the labels, `label`
            when not given and there; whole numbers or words.

    Raises:
        UserError: as above, columns that are not there or differ, files of several splits.
    """
    files = files_of_split(files, spec.split)
    schemas, group_rows = [], []
    for file in files:
        with _opened(file) as opened:
            schemas.append(opened.schema_arrow)
            groups_of = map(opened.metadata.row_group, range(opened.metadata.num_row_groups))
            group_rows.append([group.num_rows for group in groups_of])
    column = spec.image or _image_column(schemas[0], files[0])
    label = None if spec.labels is False else spec.label or _label_column(schemas[0], files[0])
    captions = [] if spec.captions is False else _caption_columns(schemas[0], spec, label)
    for file, schema in zip(files, schemas, strict=True):
        for wanted in (column, *([label] if label else []), *captions):
            if wanted not in schema.names:
                raise UserError(f"{file}: no column {wanted!r}{there_are(wanted, schema.names)}")
        if label and _known_names(schema, label) != _known_names(schemas[0], label):
            raise UserError(
                f"{file}: its column {label!r} names other classes than that of {files[0].name}, "
                f"so their numbers mean other things; prepare them apart, or --no-labels"
            )
    groups: list[tuple[int, int]] = []
    firsts: list[int] = []
    counts: list[int] = []
    for number, rows in enumerate(group_rows):
        firsts.append(sum(counts))
        groups += [(number, group) for group in range(len(rows))]
        counts += rows
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    found = _table_labels(files, label, schemas[0]) if label and starts[-1] else None
    rest = [name for name in schemas[0].names if name not in (column, label, *captions)]
    readers = [_ParquetReader(list(files), starts, groups, firsts, each) for each in captions]
    said = f"{columns_named([*map(repr, captions)])}"
    return Originals(
        name=name,
        reader=_ParquetReader(list(files), starts, groups, firsts, column),
        count=int(starts[-1]),
        listing=digest_of([*((f.name, f.stat().st_size) for f in files), column, label]),
        changed=np.repeat([last_change(f) for f in files], np.diff([*firsts, starts[-1]])),
        **label_fields(found),
        unread={f"column {name}": int(starts[-1]) for name in rest},
        notes=[
            *(found.notes if found else []),
            *([f"not read: {columns_named(rest)}"] if rest else []),
        ],
        captions=CaptionSource(_ParquetCaptions(readers), said) if captions else None,
    )


def _caption_columns(schema: Any, spec: SourceSpec, label: str | None) -> list[str]:
    """The columns of captions: those that are named, or the first of their usual names."""
    from pyarrow import types

    def holds(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
            return holds(kind.value_type)
        return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind))

    if spec.caption_fields is not None:
        there = [each for each in spec.caption_fields if each in schema.names]
        bare = [each for each in there if not holds(schema.field(each).type)]
        if bare:
            kind = schema.field(bare[0]).type
            raise UserError(
                f"{spec.path}: column {bare[0]!r} holds {kind}, no captions; --caption names "
                "columns of words, or of lists of words"
            )
        return spec.caption_fields
    names = [each for each in LIKE_CAPTIONS if each in schema.names and each != label]
    found = [each for each in names if holds(schema.field(each).type)][:1]
    if spec.captions and not found:
        known = [name for name in schema.names if name != label and holds(schema.field(name).type)]
        raise absent(spec.path, known)
    return found


def _label_column(schema: Any, file: Path) -> str | None:
    """The column `label`, or the one that can only be the labels.

    Raises:
        UserError: there are several.
    """
    from pyarrow import types

    if "label" in schema.names:
        return "label"
    found = []
    for each in schema:
        kinds = (types.is_integer, types.is_string, types.is_large_string, types.is_dictionary)
        plain = any(kind(each.type) for kind in kinds)
        if plain and (_known_names(schema, each.name) or LIKE_LABELS.fullmatch(each.name)):
            found.append(each.name)
    if len(found) > 1:
        known = {name: _known_names(schema, name) for name in found}
        said = [f"{n} of {len(names)} classes" if names else n for n, names in known.items()]
        raise UserError(
            f"{file}: several columns may be the labels ({', '.join(said)}); choose by --label "
            f"{found[0]}, or leave all out by --no-labels"
        )
    return found[0] if found else None


def _image_column(schema: Any, file: Path) -> str:
    """The one column that can hold image files."""
    from pyarrow import types

    def holds(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    found = [each.name for each in schema if holds(each.type)]
    if not found:
        raise UserError(f"{file}: no column of images ({', '.join(schema.names)})")
    if len(found) > 1:
        raise UserError(
            f"{file}: several columns may be the images ({', '.join(found)}); choose by --image "
            f"{found[0]}"
        )
    return str(found[0])


def _table_labels(files: Sequence[Path], label: str, schema: Any) -> ImageLabels:
    """Labels of all rows, with the classes' names where the tables know them."""
    values: list[Any] = []
    for file in files:
        with _opened(file) as opened:
            for batch in opened.iter_batches(_LABELS, columns=[label], use_threads=False):
                if _bytes_of(batch.column(0)) > _LONGEST_LABEL:
                    raise UserError(
                        f"{file}: column {label!r} has a label of more than {_LONGEST_LABEL:,} "
                        "bytes; --no-labels leaves it out"
                    )
                values += batch.column(0).to_pylist()
    found = number_labels(values, f"{files[0].parent}: column {label!r}")
    found.source = f"column {label!r}"
    known = _known_names(schema, label)
    # A test split may have -1 for every label, which `number_labels` refuses.
    if known and found.names is None and found.classes <= len(known):
        found.classes, found.names, found.notes = len(known), known, []
    return found


def _known_names(schema: Any, label: str) -> list[str] | None:
    """Names of classes as Hugging Face's datasets note them in a table's metadata."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        names = noted["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    fine = isinstance(names, list) and all(isinstance(each, str) for each in names)
    return names if fine else None
