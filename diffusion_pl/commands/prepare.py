"""`prepare`: write shards of a folder, an archive or a table of images, or continue to."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffusion_pl.commands import hints, recommend
from diffusion_pl.commands.options import Integer
from diffusion_pl.commands.results import Result
from diffusion_pl.data.prepare import Request, prepare
from diffusion_pl.data.recipe import Recipe
from diffusion_pl.data.shard_format import LARGEST_MANIFEST, MANIFEST, Manifest
from diffusion_pl.data.shard_workers import WorkerLost
from diffusion_pl.data.sources.base import SourceSpec
from diffusion_pl.data.stored import ENCODINGS, Encoding, no_captions, read_encodings
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small
from diffusion_pl.names import shown
from diffusion_pl.progress import reported

if TYPE_CHECKING:
    from diffusion_pl.text import Encoder

FAILURES: tuple[type[Exception], ...] = (WorkerLost,)

_SKIPPED_SHOWN = 10
_CLASSES_SHOWN = 20


def command(
    source: str,
    dest: Path | None = None,
    /,
    *,
    resolutions: str | None = None,
    filter: str = "lanczos",
    fit: str = "crop",
    encoding: str = "png",
    channels: Integer = 3,
    shard_images: Integer = 1000,
    labels: Annotated[bool | None, Parameter(negative="--no-labels")] = None,
    name: str | None = None,
    count: Integer | None = None,
    seed: Integer | None = None,
    split: str | None = None,
    image: str | None = None,
    label: str | None = None,
    captions: Annotated[bool | None, Parameter(negative="--no-captions")] = None,
    caption: str | None = None,
    encode: str | None = None,
    text_length: Integer | None = None,
    workers: Integer | None = None,
    skip_broken: Integer = 0,
) -> Result:
    """Write shards of a folder, archive or table of images, or continue where it stopped.

    With --encode the captions are encoded too; later by `prepare DEST --encode minilm` alone.

    Example: diffusion_pl prepare photos data/photos --resolutions 64 --labels

    Args:
        source: folder, .zip, CIFAR-10, .tar, LSUN, .parquet, or synthetic; or a prepared data set.
        dest: folder of the prepared data set; left out where the source is one.
        resolutions: sides in pixels, such as 256,128,64.
        filter: lanczos, box-bicubic or area.
        fit: crop, pad (white) or exact.
        encoding: png, webp, raw or jpeg.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and a fourth).
        shard_images: source images per shard.
        labels: the first folder of a path is the class.
        name: of the data set; from its source when not given.
        count: images of the synthetic set.
        seed: of the synthetic set; 0 when not given.
        split: train, val, test, or all; for CIFAR-10 train when not given.
        image: column of a table, ending in a tar, or all.
        label: column or ending of the labels, or json.FIELD.
        captions: captions are wanted, or left out; those that are there when not given.
        caption: columns, endings or json.FIELD of the captions, with commas between, or a COCO
            file.
        encode: encoder of the captions: minilm, or hf: and a folder or hub name.
        text_length: tokens that a caption is cut to; the encoder's own number when not given.
        workers: processes; one per core when not given.
        skip_broken: number of broken images that may be skipped.
    """
    if text_length is not None and encode is None:
        raise UserError("--text-length goes with --encode")
    if dest is None or resolutions is None:
        return _encoded_alone(Path(source), dest, encode, text_length)
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--name: letters, digits and . _ - only (got {name!r})")
    sides = resolutions.split(",")
    if not all(side.strip().isdecimal() for side in sides):
        raise UserError(f"--resolutions: sides in pixels, such as 256,128,64 (got {sides})")
    request = Request(
        SourceSpec(
            source,
            labels=labels,
            count=count,
            seed=seed,
            split=split,
            image=image,
            label=label,
            captions=True if encode and captions is None else captions,
            caption=caption,
        ),
        Recipe(
            resolutions=tuple(map(int, sides)),
            filter=filter,
            fit=fit,
            encoding=encoding,
            shard_images=shard_images,
            channels=channels,
        ),
        name,
    )
    processes = workers or len(os.sched_getaffinity(0))
    if processes < 1 or skip_broken < 0:
        raise UserError("--workers must be positive, --skip-broken at least 0")
    began = time.monotonic()
    encoder = None if encode is None else _encoder(encode, text_length)
    with reported() as report:
        manifest, already = prepare(
            request, dest, workers=processes, skip_broken=skip_broken, report=report
        )
    seconds = time.monotonic() - began
    # The captions first: what is to be trained on them is told with the data set.
    values, lines = ({}, []) if encoder is None else _encode(dest, encoder)
    found = result(dest, manifest, already, seconds, None if encoder is None else encoder.name)
    return Result({**found.values, **values}, [], [*lines, *found.after])


def _encoded_alone(
    folder: Path, dest: Path | None, encode: str | None, length: int | None
) -> Result:
    """Encode the captions of a data set that is prepared already."""
    if encode is None or dest is not None:
        raise UserError(
            "prepare: name the source, the folder of the prepared data set and --resolutions, such "
            "as 256,128,64; or a prepared data set alone and --encode"
        )
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"{folder}: not a prepared data set; name one, or add DEST and --resolutions"
        )
    if Manifest.read(folder).captions is None:
        raise UserError(no_captions(str(folder)))
    encoder = _encoder(encode, length)
    values, lines = _encode(folder, encoder)
    plan = recommend.plan(
        Manifest.read(folder), folder, recommend.machine(), _encoding(folder, encoder.name)
    )
    more = {"train": plan.command, "train_seconds": plan.seconds and round(plan.seconds)}
    after = [*lines, *plan.lines, "next:", f"  {plan.command}"]
    return Result({"folder": str(folder)} | values | more, [], after)


def _encoder(name: str, length: int | None) -> Encoder:
    import torch

    from diffusion_pl import text

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return text.encoder(name, length, device=device)


def _encode(folder: Path, encoder: Encoder) -> tuple[dict[str, Any], list[str]]:
    """Encode captions; what was written, as values and as lines."""
    from diffusion_pl.data.encodings import encode

    began = time.monotonic()
    with reported("captions") as report:
        encoding, already = encode(folder, encoder, report)
    size = sum(block.bytes for block in encoding.blocks)
    name = shown(encoding.encoder)
    values = {
        "encoder": encoding.encoder,
        "encoder_sha256": encoding.digest,
        "text_width": encoding.width,
        "text_length": encoding.length,
        "text_bytes": size,
        "cut": encoding.cut,
    }
    line = f"{folder}: captions are encoded by {name}, nothing to do"
    if not already:
        line = (
            f"{folder}: captions encoded by {name}, {encoding.width} numbers a token, "
            f"{size / 1e6:,.1f} MB, {time.monotonic() - began:,.1f} s"
        )
    cut = f"note: {encoding.cut:,} captions have more than {encoding.length} tokens, and were cut"
    setting = f"to train on them: data.dataset.text={name}"
    return values, [line, *([cut] if encoding.cut else []), setting]


def result(
    folder: Path, manifest: Manifest, already: bool, seconds: float, encoder: str | None = None
) -> Result:
    """The data set, what was skipped, and the command that trains on it.

    Args:
        folder: of the data set.
        manifest: of the data set.
        already: whether it was there before.
        seconds: that it took.
        encoder: name of the encoder to train with; the only one there is when not given.
    """
    on = recommend.machine()
    plan = recommend.plan(manifest, folder, on, _encoding(folder, encoder))
    size = sum(shard.bytes for shard in manifest.shards)
    values: dict[str, Any] = {
        "folder": str(folder),
        "name": manifest.name,
        "images": manifest.count,
        "classes": manifest.classes,
        "resolutions": manifest.resolutions,
        "shards": len(manifest.shards),
        "bytes": size,
        "skipped": len(manifest.skipped),
        "labels_from": manifest.labels_from,
        "class_names": manifest.class_names,
        "class_counts": manifest.class_counts,
        "captions": about.unique if (about := manifest.captions) else 0,
        "captions_from": about.origin if about else None,
        "not_read": manifest.unread or {},
        "fingerprint": manifest.fingerprint,
        "train": plan.command,
        "train_seconds": plan.seconds and round(plan.seconds),
        "machine": on.name,
    }
    lines = [*skipped_lines(manifest), *(f"note: {text}" for text in manifest.notes or [])]
    if already:
        lines.append(f"{folder} is finished: {manifest.count:,} images, nothing to do")
    else:
        lines.append(
            f"{folder}: {manifest.count:,} images at {manifest.resolutions} px in "
            f"{len(manifest.shards)} shards, {size / 1e6:,.1f} MB, {seconds:,.1f} s"
        )
    if about is not None:
        lines.append(
            f"captions: {about.total:,} ({about.unique:,} different) by {shown(about.origin)}"
        )
    if about is not None and not (folder / ENCODINGS).exists():
        line = hints.command("prepare", folder, "--encode", "minilm")
        lines.append(f"trained without captions as they are; to train with them, first: {line}")
    if any("--labels takes" in text for text in manifest.notes or []):
        lines.append(f"with classes: {recommend.with_labels(manifest, folder)}")
    lines += [*class_table(manifest), *plan.lines, "next:", f"  {plan.command}"]
    return Result(values, [], lines)


def _encoding(folder: Path, encoder: str | None) -> Encoding | None:
    """The captions to train on: those of an encoder, or of the only one; None for none of them."""
    path = folder / ENCODINGS
    if not path.exists():
        return None
    there = read_encodings(read_small(path, LARGEST_MANIFEST), str(path))
    found = [each for each in there if encoder in (None, each.encoder)]
    return found[0] if len(found) == 1 else None


def class_table(manifest: Manifest) -> Iterator[str]:
    """The classes (index, images, name); of many, the first and last."""
    if manifest.class_counts is None:
        return
    by = manifest.labels_from or "the source"
    yield f"{manifest.classes:,} classes by {by} (index, images, name):"
    rows = [
        f"  {number:>6} {count:>10,}  {shown(manifest.class_names[number])}"
        if manifest.class_names
        else f"  {number:>6} {count:>10,}"
        for number, count in enumerate(manifest.class_counts)
    ]
    if len(rows) > _CLASSES_SHOWN:
        kept = _CLASSES_SHOWN // 2
        more = f"  ... {len(rows) - 2 * kept:,} more, all in dataset.json"
        rows = [*rows[:kept], more, *rows[-kept:]]
    yield from rows


def skipped_lines(manifest: Manifest) -> Iterator[str]:
    """How many images were skipped for which reason, and the first of them."""
    if not manifest.skipped:
        return
    complaints = list(manifest.skipped.values())
    # A complaint is "where: reason (detail)".
    reasons = Counter(re.sub(r" \(.*", "", text.rpartition(": ")[2]) for text in complaints)
    summary = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    yield f"skipped {len(complaints):,} images: {summary}"
    for text in complaints[:_SKIPPED_SHOWN]:
        yield f"  {text}"
    if len(complaints) > _SKIPPED_SHOWN:
        yield "  and others, all named in dataset.json"
