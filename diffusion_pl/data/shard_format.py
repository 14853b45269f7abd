"""The format of a prepared data set: file names, index rows and `dataset.json`.

    DEST/shards/000000.tar   up to `shard_images` consecutive originals in the source's order, fewer
                             where broken ones were left out (then even none); a standard WebDataset
    <key>.<R>.<ending>       the image at R pixels, for each resolution; the key is the original's
                             place in the source, nine digits
    <key>.cls                its label in decimal digits, only in a labelled set
    <key>.json               {"name", "size": [width, height]} of the original, and "captions", a
                             list of words, where it has any
    DEST/index.npy           an array of `index_dtype`, a row an image, in order
    DEST/text/               captions, see `caption_files`, and their token states, see `encodings`
    DEST/dataset.json        `Manifest`; written last, so a folder without it is unfinished

Endings: png, webp (both without loss), jpg, and npy: raw uint8 (C, R, R) behind a header of 128
bytes. Nothing in a tar depends on time, user or machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion_pl.data.stored import CaptionFiles
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import regular, write_atomically

FORMAT = 1
MANIFEST = "dataset.json"
INDEX = "index.npy"
SHARDS = "shards"
PROGRESS = ".progress"

# The ending of an image's name for each encoding.
ENDINGS = {"png": "png", "webp": "webp", "raw": "npy", "jpeg": "jpg"}
LARGEST_RESOLUTION = 8192

# What a manifest may lack.
OPTIONAL = frozenset({"notes", "class_counts", "labels_from", "unread", "captions"})

_HEX = re.compile(r"[0-9a-f]{64}")
LARGEST_MANIFEST = 128 * 1024**2  # of some 800,000 shards


def key_of(original: int) -> str:
    """The key of an original by its place in the source."""
    return f"{original:09d}"


def shard_name(number: int) -> str:
    """A shard's path below the data set's folder."""
    return f"{SHARDS}/{number:06d}.tar"


def index_dtype(resolutions: Sequence[int]) -> np.dtype[np.void]:
    """A row of the index: `label` is -1 when unlabelled; where each resolution's bytes lie.

    `offset_R` counts bytes from the start of the shard to the first of the member's contents, of
    which there are `length_R` with the check sum `crc_R` (zlib.crc32).
    """
    columns: list[tuple[str, str]] = [("shard", "<u4"), ("label", "<i4")]
    for side in resolutions:
        columns += [(f"offset_{side}", "<u8"), (f"length_{side}", "<u4"), (f"crc_{side}", "<u4")]
    return np.dtype(columns)


@dataclass(frozen=True)
class Shard:
    """One tar.

    Args:
        file: its path below the data set's folder, with forward slashes.
        count: images in it, each at every resolution.
        bytes: its size.
        sha256: of the file, hex.
    """

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `dataset.json`.

    Args:
        name: printed with every number measured on the set.
        count: images.
        classes: number of classes, 0 when unlabelled.
        class_names: in order, or None where the source has none.
        channels: colour channels.
        resolutions: sides in pixels, descending.
        encoding: png, webp, raw or jpeg.
        filter: how images were reduced, a name of `reduce.FILTERS`, or "drawn" where they were
            drawn at each resolution.
        fit: crop, pad or exact, or "drawn".
        shard_images: originals a shard.
        source: what the images were made from, as the user named it.
        shards: in the order of the index.
        fingerprints: of the decoded images by resolution, as of `Images`.
        index_sha256: of index.npy, hex.
        skipped: errors of the originals that were left out, by key.
        versions: of the libraries that decoded, resized and encoded them.
        notes: for the user; None for none.
        class_counts: images of each class in order, None when unlabelled.
        labels_from: what the labels were read from, in words.
        unread: how many members, columns or files of the source were not read, by kind.
        captions: where they lie; None for none.
    """

    name: str
    count: int
    classes: int
    class_names: list[str] | None
    channels: int
    resolutions: list[int]
    encoding: str
    filter: str
    fit: str
    shard_images: int
    source: dict[str, Any]
    shards: list[Shard]
    fingerprints: dict[int, str]
    index_sha256: str
    skipped: dict[str, str]
    versions: dict[str, str]
    notes: list[str] | None = None
    class_counts: list[int] | None = None
    labels_from: str | None = None
    unread: dict[str, int] | None = None
    captions: CaptionFiles | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over everything but the versions: settings, contents, files."""
        return _digest_of(self._content())

    def _content(self) -> dict[str, Any]:
        content = {"format": FORMAT} | asdict(self)
        for name in OPTIONAL:  # absent where there is nothing to say, as in older data sets
            if content[name] is None:
                del content[name]
        content["fingerprints"] = {str(side): text for side, text in self.fingerprints.items()}
        return content

    def write(self, folder: Path) -> None:
        """Write `dataset.json`, whole or not at all."""
        text = json.dumps(self._content() | {"fingerprint": self.fingerprint}, indent=1)
        write_atomically(folder / MANIFEST, lambda file: file.write((text + "\n").encode()))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check `dataset.json`.

        Raises:
            UserError: absent, unreadable, of another format, or not as it was written.
        """
        path = folder / MANIFEST
        content = _read_json(path)
        if content.get("format") != FORMAT:
            raise UserError(
                f"{path}: format {content.get('format')!r}, this program reads {FORMAT}; prepare "
                f"the data again"
            )
        stated = content.pop("fingerprint", None)
        if stated != _digest_of(content):
            raise UserError(f"{path}: changed since it was written; prepare the data again")
        del content["format"]
        missing = ({field.name for field in fields(cls)} ^ set(content)) - OPTIONAL
        if missing:
            raise UserError(f"{path}: keys {', '.join(sorted(missing))} missing or unknown")
        try:
            content["shards"] = [Shard(**shard) for shard in content["shards"]]
            content["fingerprints"] = {int(k): v for k, v in content["fingerprints"].items()}
            if content.get("captions") is not None:
                content["captions"] = CaptionFiles.of(content["captions"])
            manifest = cls(**content)
            problem = manifest._problem()
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise UserError(f"{path}: not as `prepare` writes it ({error})") from error
        if problem:
            raise UserError(f"{path}: {problem}; prepare the data again")
        return manifest

    def _problem(self) -> str | None:
        """The first value that is of a wrong type, inconsistent, or leads outside the folder."""
        numbers = {"count": self.count, "classes": self.classes, "shard_images": self.shard_images}
        for shard in self.shards:
            numbers |= {
                f"count of {shard.file}": shard.count,
                f"bytes of {shard.file}": shard.bytes,
            }
        for what, number in numbers.items():
            if type(number) is not int or not 0 <= number < 2**63:
                return f"{what} must be a whole number (got {number!r})"
        if not isinstance(self.name, str) or type(self.channels) is not int:
            return f"name and channels must be a word and a number (got {self.name!r})"
        if self.channels not in (1, 3, 4):
            return f"channels must be 1, 3 or 4 (got {self.channels})"
        sides = self.resolutions
        if not sides or sides != sorted(set(sides), reverse=True):
            return f"resolutions must descend (got {sides})"
        if not all(type(side) is int and 0 < side <= LARGEST_RESOLUTION for side in sides):
            return f"resolutions must be 1 to {LARGEST_RESOLUTION} pixels (got {sides})"
        if self.encoding not in ENDINGS:
            return f"unknown encoding {self.encoding!r}"
        if self.count < 1 or self.count != sum(shard.count for shard in self.shards):
            return f"{self.count} images in all, other numbers in the shards"
        if set(self.fingerprints) != set(sides):
            return "fingerprints of other resolutions"
        if not _is_list_of(self.class_names, str) or not _is_list_of(self.notes, str):
            return "class_names and notes must be lists of words"
        if not _is_list_of(self.class_counts, int):
            return "class_counts must be a list of numbers"
        digests = [self.index_sha256, *self.fingerprints.values(), *(s.sha256 for s in self.shards)]
        if not all(_HEX.fullmatch(digest) for digest in digests):
            return "a digest that is not 64 hex digits"
        for shard in self.shards:
            parts = PurePosixPath(shard.file).parts
            if parts[:1] != (SHARDS,) or len(parts) != 2 or ".." in parts or "\\" in shard.file:
                return f"shard {shard.file!r} is not in {SHARDS}/"
        return None if self.captions is None else self.captions.problem


def _is_list_of(values: object, kind: type) -> bool:
    """Whether these are values of a kind, or None for none."""
    return values is None or (
        isinstance(values, list) and all(type(value) is kind for value in values)
    )


def open_index(folder: Path, manifest: Manifest) -> npt.NDArray[np.void]:
    """The index, mapped from the disk and checked for shape; its digest is the caller's to check.

    Raises:
        UserError: absent, damaged, or not the manifest's.
    """
    path = folder / INDEX
    try:
        # An array file and nothing else: np.load would also open an archive of such files.
        index: npt.NDArray[np.void] = np.lib.format.open_memmap(regular(path), mode="r")
    except Exception as error:
        # A damaged header is parsed as Python and raises nearly anything.
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}); prepare the data again") from error
    wanted = index_dtype(manifest.resolutions)
    if index.dtype != wanted or index.shape != (manifest.count,):
        raise UserError(f"{path}: not the index of {folder / MANIFEST}; prepare the data again")
    return index


def index_bytes(manifest: Manifest) -> int:
    """The size of the index file."""
    dtype = index_dtype(manifest.resolutions)
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": (manifest.count,)}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    return len(buffer.getvalue()) + manifest.count * dtype.itemsize


def _digest_of(content: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in content.items() if key != "versions"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    regular(path)
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise UserError(f"{path}: too large")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); where `prepare` was interrupted, run it "
            f"again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
