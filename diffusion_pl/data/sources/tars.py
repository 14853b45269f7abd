"""Originals in WebDataset tars: members that share a key up to the first dot are one sample.

Images are read by their offset.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from diffusion_pl.data.files import (
    EXTENSIONS,
    FOREIGN,
    HEAD,
    begins_as_image,
    needs_content,
)
from diffusion_pl.data.labels import (
    LIKE_LABELS,
    ImageLabels,
    folders_note,
    number_labels,
    sort_class_names,
)
from diffusion_pl.data.sources.base import Original, Originals, SourceSpec, digest_of, label_fields
from diffusion_pl.data.sources.captions import (
    LARGEST,
    LIKE_CAPTIONS,
    LOOKED,
    TOO_LARGE,
    CaptionSource,
    absent,
    content,
    fields_of,
)
from diffusion_pl.data.sources.tar_members import Member, Sample, bytes_of, samples_of
from diffusion_pl.data.splits import ALL, files_of_split
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import last_change
from diffusion_pl.names import there_are

_LARGEST_LABEL = 256
_LARGEST_JSON = 1024**2

# A tar's number, a sample of it, the ending of an image.
_Picked = tuple[int, Sample, str]


@dataclass(frozen=True)
class _TarReader:
    paths: list[str]
    # Tar, name, offset and size of each image.
    places: list[tuple[int, str, int, int]]

    def read(self, index: int) -> Original:
        tar, name, offset, size = self.places[index]
        return Original(
            f"{Path(self.paths[tar]).name}/{name}", bytes_of(self.paths[tar], offset, size)
        )


def open_tars(files: Sequence[Path], name: str, spec: SourceSpec) -> Originals:
    """Samples in the order of the tars' names, then of the tar.

    Args:
        files: the tars.
        name: of the set.
        spec: with the endings of the images, such as `256.png`, where a sample has several, or
            `all` to take each as an image of its own; and of the labels, `cls` when not given, or
            `json.FIELD` for a field of a member `.json`.

    Raises:
        UserError: a tar that is damaged or has odd members, a sample without an image or with
            several, labels that are none or only sometimes there, tars of several splits.
    """
    files = files_of_split(files, spec.split)
    samples = [(number, each) for number, file in enumerate(files) for each in samples_of(file)]
    label = (spec.label or "cls").lower()
    picked = _pick(files, samples, spec.image, label)
    if not picked:
        raise UserError(f"{files[0]}: no images here")
    found: ImageLabels | None = None
    read: set[tuple[int, str, str]] = set()
    if spec.labels is not False:
        found, read = _labels(files, picked, spec.label)
        if found is None and spec.labels:
            found = _folders(files, picked)
    captions, said = _captions(files, picked, spec)
    read |= said
    places = [
        (number, _name(sample, ending), *sample.members[ending])
        for number, sample, ending in picked
    ]
    taken = {(number, sample.key, ending) for number, sample, ending in picked} | read
    unread = Counter(
        f".{ending.rpartition('.')[2]}" if ending else "no ending"
        for number, sample in samples
        for ending in sample.members
        if (number, sample.key, ending) not in taken
    )
    times = np.array([last_change(file) for file in files], dtype=np.int64)
    return Originals(
        name=name,
        reader=_TarReader([str(file) for file in files], places),
        count=len(places),
        listing=digest_of(places),
        changed=times[[number for number, *_ in places]],
        **label_fields(found),
        unread=dict(unread.most_common()),
        notes=[*(found.notes if found else []), *_hints(files, picked, unread, found is None)],
        names=[f"{files[number].name}/{each}" for number, each, _, _ in places],
        captions=captions,
    )


def _name(sample: Sample, ending: str) -> str:
    return f"{sample.key}.{ending}" if ending else sample.key


def _pick(
    files: Sequence[Path], samples: Sequence[tuple[int, Sample]], image: str | None, label: str
) -> list[_Picked]:
    """The images to take: one a sample, or all where each has a label of its own.

    Raises:
        UserError: samples with several images of which none is chosen, or with none.
    """
    if image is not None and image.lower() != ALL:
        for number, sample in samples:
            if image.lower() not in sample.members:
                known = [each for _, other in samples for each in other.members]
                raise UserError(
                    f"{files[number]}: {sample.key} has no member .{image}{there_are(image, known)}"
                )
        return [(number, sample, image.lower()) for number, sample in samples]
    found = [(number, sample, _images(sample, label, files[number])) for number, sample in samples]
    every = [(number, sample, each) for number, sample, images in found for each in images]
    several = next((each for each in found if len(each[2]) > 1), None)
    own = all(_beside(each, label) in sample.members for _, sample, each in every)
    if several is None or own or image is not None:
        return every
    number, sample, images = several
    counts = Counter(each for _, _, each in every)
    raise UserError(
        f"{files[number]}: {sample.key} has several images ({', '.join(images)}); --image "
        f"{images[0]} takes one a key, {counts[images[0]]:,} of all {len(every):,}, and --image "
        f"{ALL} takes every one as an image of its own"
    )


def _beside(image: str, ending: str) -> str:
    """The ending of what belongs to one image among several of a key: 1.cls of 1.png."""
    stem = image.rpartition(".")[0]
    return f"{stem}.{ending}" if stem else ending


def _labels(
    files: Sequence[Path], picked: Sequence[_Picked], wanted: str | None
) -> tuple[ImageLabels | None, set[tuple[int, str, str]]]:
    """The labels of the picked images, and the members that were read for them."""
    label = (wanted or "cls").lower()
    field = wanted[5:] if wanted and label.startswith("json.") else None
    ending = "json" if field is not None else label
    members = [_member(sample, image, ending) for _, sample, image in picked]
    if field is None and not any(members):
        if wanted is None:
            field = "label" if "label" in _fields(files, picked[0]) else None
        if field is None and wanted is None:
            return None, set()
        if field is not None:
            ending = "json"
            members = [_member(sample, image, ending) for _, sample, image in picked]
    if None in members:
        number, sample, image = picked[members.index(None)]
        offered = there_are(wanted or "", _offered(files, picked)) if not any(members) else ""
        raise UserError(
            f"{files[number]}: {_name(sample, image)} has no member .{ending}, its label{offered}"
        )
    values: list[Any] = []
    for (number, sample, _), member in zip(picked, members, strict=True):
        assert member is not None
        where = f"{files[number]}: {sample.key}"
        place = sample.members[member]
        if field is None:
            values.append(
                _word(bytes_of(str(files[number]), *_small(place, _LARGEST_LABEL, where)))
            )
        else:
            data = bytes_of(str(files[number]), *_small(place, _LARGEST_JSON, where))
            values.append(_parsed(data, where).get(field))
    if field is not None and all(value is None for value in values):
        raise UserError(
            f"{files[0]}: --label json.{field}: no field {field!r} of .json beside an image"
            f"{there_are(f'json.{field}', _offered(files, picked))}"
        )
    source = f"field {field!r} of .json" if field is not None else f"members .{ending}"
    found = number_labels(values, f"{files[0].parent}: {source}")
    found.source = source
    read = {
        (number, sample.key, str(member))
        for (number, sample, _), member in zip(picked, members, strict=True)
    }
    return found, read


@dataclass(frozen=True)
class _TarCaptions:
    paths: list[str]
    # Of each image: tar, offset, size and, of a .json, the field.
    places: list[list[tuple[int, int, int, str | None]]]

    @property
    def listing(self) -> str:
        return digest_of(self.places)

    def read(self, index: int) -> list[Any]:
        return [
            TOO_LARGE if size > LARGEST else content(bytes_of(self.paths[tar], offset, size), field)
            for tar, offset, size, field in self.places[index]
        ]


def _captions(
    files: Sequence[Path], picked: Sequence[_Picked], spec: SourceSpec
) -> tuple[CaptionSource | None, set[tuple[int, str, str]]]:
    """The captions of the picked images, and the members that hold them.

    Raises:
        UserError: none of those that are named.
    """
    wanted = _caption_members(files, picked, spec)
    places: list[list[tuple[int, int, int, str | None]]] = [[] for _ in picked]
    read: set[tuple[int, str, str]] = set()
    for ending, name in wanted:
        found = [_member(sample, image, ending) for _, sample, image in picked]
        if spec.caption is not None and not _holds(files, picked, found, name):
            word = ending if name is None else f"json.{name}"
            what = f"member .{ending}" if name is None else f"field {name!r} of .json"
            raise UserError(
                f"{spec.path}: --caption {word}: no {what} beside an image"
                f"{there_are(word, _offered(files, picked))}"
            )
        for place, (number, sample, _), member in zip(places, picked, found, strict=True):
            if member is not None:
                place.append((number, *sample.members[member], name))
                read.add((number, sample.key, member))
    if not read:
        if spec.captions:
            raise absent(spec.path, _offered(files, picked))
        return None, read
    origin = [f"members .{e}" if f is None else f"field {f!r} of .json" for e, f in wanted]
    reader = _TarCaptions([str(each) for each in files], places)
    return CaptionSource(reader, ", ".join(origin)), read


def _caption_members(
    files: Sequence[Path], picked: Sequence[_Picked], spec: SourceSpec
) -> list[tuple[str, str | None]]:
    """The endings of members with captions, each with the field of a .json."""
    if spec.captions is False:
        return []
    if spec.caption_fields is not None:
        return [
            ("json", each[5:]) if each.lower().startswith("json.") else (each.lower(), None)
            for each in spec.caption_fields
        ]
    label = (spec.label or "").lower()
    if label != "txt" and any(_member(sample, image, "txt") for _, sample, image in picked):
        return [("txt", None)]
    fields = _caption_fields(files, picked)
    like = [each for each in LIKE_CAPTIONS if each in fields and f"json.{each}" != label]
    return [("json", each) for each in like[:1]]


def _holds(
    files: Sequence[Path],
    picked: Sequence[_Picked],
    found: Sequence[str | None],
    field: str | None,
) -> bool:
    """Whether a member was found, and a .json among them with the field."""
    if field is None:
        return any(found)
    each = zip(picked, found, strict=True)
    return field in _fields_of(files, ((n, sample, e) for (n, sample, _), e in each if e))


def _caption_fields(files: Sequence[Path], picked: Sequence[_Picked]) -> list[str]:
    """The fields of the first .json members of images."""
    members = (
        (number, sample, member)
        for number, sample, image in picked
        if (member := _member(sample, image, "json"))
    )
    return list(dict.fromkeys(_fields_of(files, islice(members, LOOKED))))


def _fields_of(files: Sequence[Path], members: Iterable[_Picked]) -> Iterator[str]:
    """The fields of .json members, one after the other; large members have none."""
    for number, sample, member in members:
        place = sample.members[member]
        if place.size <= LARGEST:
            yield from fields_of(bytes_of(str(files[number]), *place)) or {}


def _offered(files: Sequence[Path], picked: Sequence[_Picked]) -> list[str]:
    """The endings and fields that --caption and --label could name."""
    endings = []
    for _, sample, image in picked:
        stem = image.rpartition(".")[0]
        for each in sample.members:
            own = each.removeprefix(f"{stem}.") if stem else each
            if _last(each) not in EXTENSIONS and each not in ("", "json") and "." not in own:
                endings.append(own)
    return [*dict.fromkeys(endings), *(f"json.{each}" for each in _caption_fields(files, picked))]


def _tops(picked: Sequence[_Picked]) -> list[str]:
    """The first folder of each image below those that hold all of them, "" for none."""
    folders = [PurePosixPath(sample.key).parts[:-1] for _, sample, _ in picked]
    depth = 0
    while min(map(len, folders)) > depth and len({each[depth] for each in folders}) == 1:
        depth += 1
    return [each[depth] if len(each) > depth else "" for each in folders]


def _folders(files: Sequence[Path], picked: Sequence[_Picked]) -> ImageLabels | None:
    """Classes by the folders in the tars, which the user has asked for; None where there are none.

    Raises:
        UserError: an image in none of them.
    """
    tops = _tops(picked)
    if not any(tops):
        return None
    if "" in tops:
        number, sample, ending = picked[tops.index("")]
        raise UserError(
            f"{files[number]}: {_name(sample, ending)} has no label beside it and lies in no "
            f"folder of a class; leave out --labels"
        )
    return number_labels(tops, "folders", sort_class_names(tops))


def _member(sample: Sample, image: str, ending: str) -> str | None:
    """The member of an ending that belongs to an image: its own, or the sample's."""
    return next((e for e in (_beside(image, ending), ending) if e in sample.members), None)


def _small(place: Member, most: int, where: str) -> Member:
    if place.size > most:
        raise UserError(f"{where}: a label of {place.size:,} bytes is none")
    return place


def _fields(files: Sequence[Path], pick: _Picked) -> dict[str, Any]:
    """The fields of the .json of an image; none where it has none."""
    number, sample, image = pick
    member = _member(sample, image, "json")
    if member is None or sample.members[member].size > _LARGEST_JSON:
        return {}
    data = bytes_of(str(files[number]), *sample.members[member])
    return _parsed(data, f"{files[number]}: {sample.key}")


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its .json is not JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _hints(
    files: Sequence[Path], picked: Sequence[_Picked], unread: Counter[str], bare: bool
) -> list[str]:
    """Notes on members that are not read."""
    notes = []
    tops = _tops(picked) if bare else []
    if bare and "" not in tops:
        notes.append(folders_note(tops))
    if bare and ".json" in unread:
        fields = _fields(files, picked[0])
        like = [n for n, v in fields.items() if LIKE_LABELS.fullmatch(n) and type(v) in (int, str)]
        if like:
            notes.append(
                f"the .json members hold {', '.join(like)}; --label json.{like[0]} takes them as "
                f"labels"
            )
    if unread:
        said = [
            f"{count:,} {ending}{' (captions?)' if ending == '.txt' else ''}"
            for ending, count in unread.most_common()
        ]
        notes.append(f"not read: {', '.join(said)}")
    return notes


def _images(sample: Sample, label: str, file: Path) -> list[str]:
    """The endings of a sample's images; none for a sample without image and label.

    Raises:
        UserError: an image of another kind, or a label without an image.
    """
    found = [
        ending
        for ending, member in sample.members.items()
        if _last(ending) in EXTENSIONS
        or (needs_content(_last(ending)) and begins_as_image(_head(file, member)))
    ]
    if found:
        return found
    foreign = [ending for ending in sample.members if _last(ending) in FOREIGN]
    if foreign:
        raise UserError(
            f"{file}: {sample.key}.{foreign[0]}: not PNG, JPEG or WebP; convert it or remove it"
        )
    if any(ending == label or ending.endswith(f".{label}") for ending in sample.members):
        raise UserError(f"{file}: {sample.key} has a label and no image")
    return []


def _last(ending: str) -> str:
    return f".{ending.rpartition('.')[2]}" if ending else ""


def _head(file: Path, member: Member) -> bytes:
    return bytes_of(str(file), member.offset, min(member.size, HEAD))


def _word(data: bytes) -> str:
    return data.decode("utf-8", "replace").strip()
