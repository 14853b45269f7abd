"""How images lie in a folder or an archive: splits, classes, labels, and files that are not read.

Known layouts:
    folders of classes                     the first folder of a path, wrapped in others or not
    dataset.json                           {"labels": [["00000/img00000000.png", 6], ...]} or null,
                                           as the packing tools of StyleGAN and EDM write it
    metadata.csv, metadata.jsonl           a row a file, `file_name` and a column of labels, as
                                           Hugging Face's imagefolder takes them
    train/, val/, test/ (and other words)  splits, of which one is taken; never classes
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from diffusion_pl.data.files import (
    EXTENSIONS,
    FOREIGN,
    IMAGES,
    SAMPLE,
    Files,
    begins_as_image,
    ending_of,
    needs_content,
    opened,
    refuse_control,
)
from diffusion_pl.data.labels import (
    ImageLabels,
    first_few,
    folders_note,
    number_labels,
    sort_class_names,
)
from diffusion_pl.data.metadata import METADATA, columns_named, folders_above, json_of, rows_of
from diffusion_pl.data.sources.captions import CaptionSource, absent
from diffusion_pl.data.sources.folder_captions import FolderCaptions, find_captions, offered
from diffusion_pl.data.splits import ALL, is_split, split_of
from diffusion_pl.errors import UserError
from diffusion_pl.names import there_are

_PACKED = "dataset.json"

# Folders of 1,000 numbered images, as the packing tools write them.
_INDEX_FOLDER = re.compile(r"(\d{5})/img(\d{8})\.\w+")

# Names that `sample` gives its images and the grid of them.
_NUMBERED = re.compile(r"\d{6,}\.png")
_OVERVIEW = "grid.png"

_SHOWN = 3
_KINDS = 8


@dataclass(frozen=True)
class Listing:
    """What a folder or an archive holds.

    Args:
        files: to read from.
        names: of the images, in order.
        labels: of the images.
        unread: how many files of each ending are not read.
        notes: for the user.
        captions: of the images.
    """

    files: Files
    names: list[str]
    labels: ImageLabels | None
    unread: dict[str, int]
    notes: list[str]
    captions: CaptionSource | None = None


def list_images(
    path: str,
    *,
    labels: bool | None,
    split: str | None = None,
    column: str | None = None,
    captions: bool | None = False,
    caption: str | None = None,
) -> Listing:
    """List the images of a folder or a zip file; nothing is decoded.

    Args:
        path: of the folder or file.
        labels: True requires classes, False leaves them out; None takes those of a file of labels,
            and notes where folders may be classes.
        split: which of several splits; `all` takes every one.
        column: of metadata.csv or metadata.jsonl, with the labels.
        captions: False leaves them out.
        caption: where they are, as `find_captions` takes it.

    Raises:
        UserError: nothing there, no images, splits of which none is chosen, or no classes.
    """
    files = opened(path)
    images, others = _sorted_out(path, files, sorted(files.names()))
    prefix, layers = _place(path, images, split)
    notes: list[str] = []
    if split is not None and split.lower() != ALL:
        total = len(images)
        images = [name for name in images if is_split(_split_of(name, layers), split)]
        others = [
            name
            for name in others
            if (word := _split_of(name, layers)) == "" or is_split(word, split)
        ]
        if len(images) < total:
            notes.append(f"split {split}: {len(images):,} of {total:,} images")
    layers = _unwrapped(images, layers)
    foreign = next((name for name in others if ending_of(name) in FOREIGN), None)
    if foreign is not None:
        raise UserError(f"{path}/{foreign}: not PNG, JPEG or WebP; convert it or remove it")
    said = FolderCaptions()
    if captions is not False:
        said = find_captions(path, files, others, images, caption)
        if captions and said.source is None:
            raise absent(path, offered(files, others, images))
        notes += said.notes
    found: ImageLabels | None = None
    read: set[str] = set()
    if labels is not False:
        found, read = _written_down(path, files, others, images, column, said.columns, notes)
        if found is None and not read:
            found = _folders(path, files, images, prefix, layers, labels, notes)
    if labels and found is None:
        raise UserError(f"{path}: {_PACKED} says that there are no labels; leave labels out")
    rest = [name for name in others if name not in read | said.read]
    unread = dict(Counter(ending_of(name) or "no ending" for name in rest).most_common())
    if rest:
        notes.append(_not_read(rest, images))
    notes = [*(found.notes if found else ()), *notes]
    return Listing(files, images, found, unread, notes, said.source)


def _sorted_out(path: str, files: Files, every: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the names of images from those of other files."""
    images, others = [], []
    overviews = _overviews(every)
    for name in every:
        refuse_control(name, path)
        ending = ending_of(name)
        if name in overviews:
            others.append(name)
        elif ending in EXTENSIONS or (needs_content(ending) and begins_as_image(files.head(name))):
            images.append(name)
        else:
            others.append(name)
    foreign = next((name for name in others if ending_of(name) in FOREIGN), None)
    if not images and foreign is not None:
        raise UserError(f"{path}/{foreign}: not PNG, JPEG or WebP; convert it or remove it")
    if not images:
        counts = Counter(ending_of(name) or "no ending" for name in others)
        there = ", ".join(f"{count:,} {ending}" for ending, count in counts.most_common(_SHOWN))
        raise UserError(
            f"{path}: no images here (looked for .png .jpg .jpeg .webp"
            + (f"; there are {there}: unpack archives, or name one)" if there else ")")
        )
    return images, others


def _overviews(every: Sequence[str]) -> set[str]:
    """Find the grids that `sample` writes: in the folder above its images, earlier beside them."""
    siblings: dict[PurePosixPath, list[PurePosixPath]] = {}
    for name in every:
        place = PurePosixPath(name)
        siblings.setdefault(place.parent, []).append(place)
    found = set()
    for folder, files in siblings.items():
        below = siblings.get(folder / IMAGES, [])
        numbered_below = any(_NUMBERED.fullmatch(file.name) for file in below)
        own = bool(below) and (folder / SAMPLE in files or numbered_below)
        drawn = [file for file in files if _NUMBERED.fullmatch(file.name)]
        rest = [file for file in files if file not in drawn and file.suffix == ".png"]
        if (own or drawn) and [file.name for file in rest] == [_OVERVIEW]:
            found.add(str(folder / _OVERVIEW))
    return found


# Splits and folders around everything.


@dataclass(frozen=True)
class _Layers:
    """Which folder of a path, counted from 0, names the split (None: none does) and the class."""

    split: int | None
    class_: int


def _place(path: str, images: Sequence[str], split: str | None) -> tuple[str, _Layers]:
    """Find the folder that holds everything ("" where none does), and what the folders in it mean.

    Raises:
        UserError: several splits of which none is chosen, or one that is not there.
    """
    folders = [PurePosixPath(name).parts[:-1] for name in images]
    depth = 0
    shortest = min(map(len, folders))
    # Pass over folders that hold everything.
    while shortest > depth + 1 and len({each[depth] for each in folders}) == 1:
        depth += 1
    at: int | None = None
    for place in (depth, depth + 1):
        words = {each[place] for each in folders if len(each) > place}
        known = {word for word in words if split_of(word)}
        # Below classes every folder must be a split; at the top some may be something else.
        if len({split_of(word) for word in known}) > 1 and (place == depth or known == words):
            at = place
            break
    prefix = "/".join(folders[0][:depth])
    if at is None:
        _check_split_absent(path, folders[0][: depth + 1], split)
        return prefix, _Layers(None, depth)
    words = {each[at] for each in folders if len(each) > at}
    names = sorted(word for word in words if split_of(word))
    if split is None or not (split.lower() == ALL or any(is_split(each, split) for each in names)):
        problem = "" if split is None else f" and no {split!r}"
        first = next((word for word in names if is_split(word, "train")), names[0])
        raise UserError(
            f"{path}: holds the splits {', '.join(names)}{problem}; take one by --split {first} "
            f"(in an experiment: data.split={first}), or all as one set by --split {ALL}"
        )
    return prefix, _Layers(at, depth + 1 if at == depth else depth)


def _unwrapped(images: Sequence[str], layers: _Layers) -> _Layers:
    """Pass over folders that hold everything of the chosen split."""
    folders = [PurePosixPath(name).parts[:-1] for name in images]
    place = layers.class_
    if layers.split is not None and layers.split > place:
        return layers
    while min(map(len, folders)) > place + 1 and len({each[place] for each in folders}) == 1:
        place += 1
    return _Layers(layers.split, place)


def _check_split_absent(path: str, folders: Sequence[str], split: str | None) -> None:
    if split is None or split.lower() == ALL or any(is_split(each, split) for each in folders):
        return
    raise UserError(f"{path}: holds no splits such as train/ and test/; leave out split {split!r}")


def _split_of(name: str, layers: _Layers) -> str:
    parts = PurePosixPath(name).parts[:-1]
    if layers.split is None:
        # The one split that is there, or the folder around everything.
        return next((part for part in parts if split_of(part)), "")
    return parts[layers.split] if len(parts) > layers.split else ""


# Labels.


def _written_down(
    path: str,
    files: Files,
    others: Sequence[str],
    images: Sequence[str],
    column: str | None,
    captions: Sequence[str],
    notes: list[str],
) -> tuple[ImageLabels | None, set[str]]:
    """Read the labels in a file beside the images; also returns which files were read."""
    there = set(others)
    for start in folders_above(images[0]):
        if start + _PACKED in there:
            known, labels = _packed(files, start, images)
            if known:
                return labels, {start + _PACKED}
        for name in METADATA:
            if start + name in there:
                labels = _tabled(files, start + name, images, column, captions, notes)
                if labels is not None:
                    return labels, {start + name}
    if column is not None:
        raise UserError(
            f"{path}: --label names a column of {' or '.join(METADATA)}, and neither is here"
        )
    return None, set()


def _packed(files: Files, start: str, images: Sequence[str]) -> tuple[bool, ImageLabels | None]:
    """Whether a dataset.json has the key `labels`, and the labels of the images."""
    name = start + _PACKED
    content = json_of(files.read(name), name)
    if not isinstance(content, dict) or "labels" not in content:
        return False, None
    if content["labels"] is None:
        return True, None
    try:
        pairs = {str(key).replace("\\", "/"): label for key, label in content["labels"]}
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: labels are no pairs of a file and a class ({error})") from error
    return True, _of_names(pairs, start, images, name)


def _of_names(pairs: dict[str, Any], start: str, images: Sequence[str], source: str) -> ImageLabels:
    """Number the labels that a file gives by name.

    Raises:
        UserError: an image without a label, or labels that are no classes.
    """
    given = [pairs.get(name.removeprefix(start)) for name in images]
    missing = [name for name, label in zip(images, given, strict=True) if label is None]
    if missing:
        raise UserError(
            f"{source}: no label for {len(missing):,} of {len(images):,} images ({missing[0]}); "
            f"leave labels out (--no-labels), or mend it"
        )
    found = number_labels(given, source)
    gone = len(pairs.keys() - {name.removeprefix(start) for name in images})
    if gone:
        found.notes.append(f"{source} names {gone:,} files that are not here")
    return found


def _tabled(
    files: Files,
    where: str,
    images: Sequence[str],
    column: str | None,
    captions: Sequence[str],
    notes: list[str],
) -> ImageLabels | None:
    """Labels of a metadata table; None where it has no column of labels."""
    start = where.removesuffix(PurePosixPath(where).name)
    rows = list(rows_of(files.read(where), where))
    if not rows or "file_name" not in rows[0]:
        return None
    columns = [str(each) for each in rows[0]]
    wanted = column or ("label" if "label" in columns else None)
    if wanted is not None and wanted not in columns:
        raise UserError(f"{where}: no column {wanted!r}{there_are(wanted, columns)}")
    rest = [each for each in columns if each not in ("file_name", wanted, *captions)]
    if rest:
        notes.append(f"not read of {where}: {columns_named(rest)}")
    if wanted is None:
        return None
    pairs = {str(row["file_name"]).replace("\\", "/"): row.get(wanted) for row in rows}
    found = _of_names(pairs, start, images, where)
    found.source = f"column {wanted!r} of {where}"
    return found


def _folders(
    path: str,
    files: Files,
    images: Sequence[str],
    prefix: str,
    layers: _Layers,
    labels: bool | None,
    notes: list[str],
) -> ImageLabels | None:
    """Take folders as classes where labels are wanted, else note that they may be classes."""
    parts = [PurePosixPath(name).parts[:-1] for name in images]
    tops = [each[layers.class_] if len(each) > layers.class_ else None for each in parts]
    packed = _are_index_folders(images)
    if not labels:
        if None not in tops and len(set(tops)) > 1 and not packed:
            notes.append(folders_note(map(str, tops)))
        return None
    if None in tops:
        raise UserError(
            f"{path}/{images[tops.index(None)]}: in no folder, so without a class; move it into "
            f"one or set labels: false"
        )
    classes = sort_class_names({str(top) for top in tops})
    if len(classes) < 2:
        raise UserError(
            f"{path}: the only class is {classes[0]!r}; folders of classes must lie at the top, or "
            f"set labels: false"
        )
    if packed:
        raise UserError(
            f"{path}: its folders {first_few(classes)} number the images and are no classes, and "
            f"it has no {_PACKED} with labels; leave labels out (--no-labels)"
        )
    found = number_labels([str(top) for top in tops], "folders", classes)
    inside = f" in {prefix}/" if prefix else ""
    found.source = f"folders{inside}"
    _look_around(files, prefix, layers, images, classes, found.notes)
    return found


def _look_around(
    files: Files,
    prefix: str,
    layers: _Layers,
    images: Sequence[str],
    classes: Sequence[str],
    notes: list[str],
) -> None:
    """Note empty folders, and classes with almost the same name."""
    if layers.split is None or layers.split < layers.class_:
        above = "/".join(PurePosixPath(images[0]).parts[: layers.class_])
        empty = sort_class_names(set(files.folders(above)) - set(classes))
        if empty:
            notes.append(f"folders without an image are no classes: {first_few(empty)}")
    alike = Counter(name.casefold().strip() for name in classes)
    twins = [name for name in classes if alike[name.casefold().strip()] > 1]
    if twins:
        notes.append(f"classes whose names differ by case or spaces alone: {first_few(twins)}")


def _are_index_folders(images: Sequence[str]) -> bool:
    """Whether every image lies where the packing tools put the image of its number."""
    found = (_INDEX_FOLDER.fullmatch(name) for name in images)
    return all(each is not None and int(each[1]) == int(each[2]) // 1000 for each in found)


def _not_read(names: Sequence[str], images: Sequence[str]) -> str:
    """A note on the files that are not read."""
    stems = {str(PurePosixPath(name).with_suffix("")) for name in images}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(ending_of(name) or "no ending", []).append(name)
    said = []
    for ending, of in sorted(groups.items(), key=lambda group: -len(group[1])):
        beside = sum(str(PurePosixPath(name).with_suffix("")) in stems for name in of)
        what = f" ({', '.join(of)})" if len(of) < _SHOWN else ""
        if beside > len(of) // 2:
            what = " beside images (captions?)" if ending == ".txt" else " beside images"
        said.append(f"{len(of):,} {ending}{what}")
    more = f" and {len(said) - _KINDS:,} more kinds" if len(said) > _KINDS else ""
    return f"not read: {', '.join(said[:_KINDS])}{more}"
