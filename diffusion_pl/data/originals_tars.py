"""Originals in WebDataset tars: members that share a key up to the first dot are one sample.

The tars are looked through once, header by header; images are then read by their place. Nothing is
unpacked, and what a tar of images has no need of is refused: links, devices, paths that lead out.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from diffusion_pl.data.folder import CONTROL, EXTENSIONS, FOREIGN, LARGEST_FILE
from diffusion_pl.data.originals import Asked, Original, Originals, checked_labels, digest_of

_BLOCK = 512

# Zero blocks that fill up a tar's last record; 10 KiB is usual, some writers use more.
_LARGEST_TAIL = 1024**2

_LARGEST_LABEL = 32


@dataclass(frozen=True)
class _Member:
    offset: int
    size: int


@dataclass
class _Sample:
    """Members of one key, by their ending."""

    key: str
    members: dict[str, _Member] = field(default_factory=dict)


@dataclass(frozen=True)
class _TarReader:
    paths: list[str]
    # Tar, name, offset and size of each image.
    places: list[tuple[int, str, int, int]]

    def read(self, index: int) -> Original:
        tar, name, offset, size = self.places[index]
        return Original(
            f"{Path(self.paths[tar]).name}/{name}", _bytes(self.paths[tar], offset, size)
        )


def open_tars(files: Sequence[Path], name: str, asked: Asked) -> Originals:
    """Samples in the order of the tars' names, then of the tar.

    Args:
        files: the tars.
        name: of the set.
        asked: with the endings of the images, such as `256.png`, where a sample has several, and
            of the labels, `cls` when not given.

    Raises:
        ValueError: a tar that is damaged or has odd members, a sample without an image or with
            several, labels that are none or only sometimes there.
    """
    label = asked.label or "cls"
    places: list[tuple[int, str, int, int]] = []
    labels: list[int | None] = []
    for number, file in enumerate(files):
        for sample in _samples(file):
            ending = _image_of(sample, asked.image, label, file)
            if ending is None:
                continue
            found = sample.members[ending]
            places.append((number, f"{sample.key}.{ending}", found.offset, found.size))
            written = sample.members.get(label) if asked.labels is not False else None
            labels.append(None if written is None else _label(file, sample.key, written))
    if not places:
        raise ValueError(f"{files[0]}: no images here")
    numbers = [number for number in labels if number is not None]
    if len(numbers) < len(labels) and (numbers or asked.label):
        tar, first, _, _ = places[labels.index(None)]
        raise ValueError(f"{files[tar]}: {first} has no member .{label}, its label")
    checked = checked_labels(numbers, str(files[0].parent)) if numbers else None
    return Originals(
        name=name,
        reader=_TarReader([str(file) for file in files], places),
        count=len(places),
        listing=digest_of(places),
        labels=checked,
        classes=0 if checked is None else int(checked.max()) + 1,
    )


def _samples(file: Path) -> Iterator[_Sample]:
    """Samples of one tar, its end checked."""
    sample: _Sample | None = None
    end = 0
    try:
        with tarfile.open(file, "r:") as archive:
            while (member := archive.next()) is not None:
                # tarfile keeps every header that it has seen; a tar may have a million.
                archive.members = []  # type: ignore[attr-defined]
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK * member.isreg()
                if not _admitted(member, file):
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = _Sample(key)
                if ending.lower() in sample.members:
                    raise ValueError(f"{file}: {member.name} is there twice")
                sample.members[ending.lower()] = _Member(member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{file}: damaged or not a .tar ({error}); fetch it again") from error
    _check_end(file, end)
    if sample is not None:
        yield sample


def _admitted(member: tarfile.TarInfo, file: Path) -> bool:
    """Whether a member is a file to look at."""
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts or "\\" in member.name:
        raise ValueError(f"{file}: {member.name!r} has an odd path")
    if CONTROL.search(member.name):
        raise ValueError(f"{file}: {member.name!r} has an odd path")
    if member.isdir():
        return False
    if not member.isreg() or member.issparse():
        raise ValueError(f"{file}: {member.name!r} is a link, a device or no plain file")
    if member.size > LARGEST_FILE:
        raise ValueError(f"{file}: {member.name} is too large for an image")
    return not any(part.startswith((".", "__")) for part in parts)


def _check_end(file: Path, end: int) -> None:
    """A tar ends with zero blocks; tarfile itself passes over garbage there and over their lack."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(end)
        tail = stream.read(_LARGEST_TAIL)
    if len(tail) < _BLOCK or any(tail[:_BLOCK]):
        raise ValueError(f"{file}: ends too soon or is damaged at byte {end:,}; fetch it again")
    if any(tail) or size > end + _LARGEST_TAIL:
        raise ValueError(
            f"{file}: goes on behind its end at byte {end:,}; unpack and pack it again"
        )


def _image_of(sample: _Sample, image: str | None, label: str, file: Path) -> str | None:
    """The ending of a sample's image; None for a sample without image and label."""
    if image is not None:
        if image.lower() not in sample.members:
            raise ValueError(f"{file}: {sample.key} has no member .{image}")
        return image.lower()
    found = [each for each in sample.members if f".{each.rpartition('.')[2]}" in EXTENSIONS]
    if len(found) > 1:
        raise ValueError(
            f"{file}: {sample.key} has several images ({', '.join(found)}); choose by --image "
            f"{found[0]}"
        )
    if found:
        return found[0]
    foreign = [each for each in sample.members if f".{each.rpartition('.')[2]}" in FOREIGN]
    if foreign:
        raise ValueError(
            f"{file}: {sample.key}.{foreign[0]}: not PNG, JPEG or WebP; convert it or remove it"
        )
    if label in sample.members:
        raise ValueError(f"{file}: {sample.key} has a label and no image")
    return None


def _label(file: Path, key: str, member: _Member) -> int:
    text = _bytes(str(file), member.offset, min(member.size, _LARGEST_LABEL)).strip()
    if not text.isdigit() or member.size > _LARGEST_LABEL:
        raise ValueError(f"{file}: {key}: labels are whole numbers (got {text!r})")
    return int(text)


def _bytes(path: str, offset: int, size: int) -> bytes:
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) < size:
        raise ValueError(f"{path}: ends too soon; fetch it again")
    return data
