"""`prepare`: from a folder, an archive or a table of images to shards; again: goes on."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_pl.commands import recommend, results
from diffusion_pl.data.originals import Asked
from diffusion_pl.data.prepare import Request, prepare
from diffusion_pl.data.prepare_progress import reported
from diffusion_pl.data.recipe import Recipe
from diffusion_pl.data.shard_format import Manifest
from diffusion_pl.data.shard_workers import WorkerLost
from diffusion_pl.errors import UserError
from diffusion_pl.names import shown

FAILURES: tuple[type[Exception], ...] = (WorkerLost,)

_SKIPPED_SHOWN = 10
_CLASSES_SHOWN = 20


def run(options: argparse.Namespace) -> int:
    """Prepare, then say what there is and how to train on it."""
    if options.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", options.name):
        raise UserError(f"--name: letters, digits and . _ - only (got {options.name!r})")
    request = Request(asked(options), recipe(options), options.name)
    workers = options.workers or len(os.sched_getaffinity(0))
    if workers < 1 or options.skip_broken < 0:
        raise UserError("--workers must be positive, --skip-broken at least 0")
    began = time.monotonic()
    try:
        with reported() as report:
            manifest, already = prepare(
                request,
                options.dest,
                workers=workers,
                skip_broken=options.skip_broken,
                report=report,
            )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    tell(options, manifest, already, time.monotonic() - began)
    return 0


def asked(options: argparse.Namespace) -> Asked:
    """The source of the command line."""
    names = ("labels", "count", "seed", "split", "image", "label")
    return Asked(options.source, **{name: getattr(options, name) for name in names})


def recipe(options: argparse.Namespace) -> Recipe:
    """What the command line wants of every image.

    Raises:
        UserError: resolutions that are no numbers, or any setting out of range.
    """
    words = options.resolutions.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--resolutions: sides in pixels, such as 256,128,64 (got {words})")
    return Recipe(
        resolutions=tuple(map(int, words)),
        filter=options.filter,
        fit=options.fit,
        encoding=options.encoding,
        shard_images=options.shard_images,
        channels=options.channels,
    )


def tell(options: argparse.Namespace, manifest: Manifest, already: bool, seconds: float) -> None:
    """Print the result as JSON on stdout, and for people on stderr what was skipped and is next."""
    folder: Path = options.dest
    on = recommend.machine()
    plan = recommend.plan(manifest, folder, on)
    size = sum(shard.bytes for shard in manifest.shards)
    result: dict[str, Any] = {
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
    if any("--labels takes" in text for text in manifest.notes or []):
        lines.append(f"with classes: {recommend.with_labels(manifest, folder)}")
    lines += [*class_table(manifest), *plan.lines, "next:", f"  {plan.command}"]
    results.tell(options, result, [])
    # What to type next stands last, where it is seen.
    print("\n".join(map(shown, lines)), file=sys.stderr)


def class_table(manifest: Manifest) -> Iterator[str]:
    """The classes: index, images, name; a long table's first and last, all of it is in the set."""
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
        more = f"  ... {len(rows) - 2 * kept:,} more, all of them in dataset.json"
        rows = [*rows[:kept], more, *rows[-kept:]]
    yield from rows


def skipped_lines(manifest: Manifest) -> Iterator[str]:
    """How many originals were left out for which reason, and the first of them."""
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
        yield "  and others; all of them are named in dataset.json"
