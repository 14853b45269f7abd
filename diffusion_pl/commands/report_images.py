"""The part of a report that shows the grids of samples through training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from diffusion_pl.commands.compare import evenly
from diffusion_pl.commands.report_read import Told
from diffusion_pl.io.files import read_small
from diffusion_pl.page.html import Html, Part, image, paragraph, part, slider, tag

GRIDS = 24  # of a run, evenly through its training
WIDEST = 800  # pixels of a grid
LARGEST = 30_000_000  # bytes of a file
SHARP = 250_000  # bytes up to which a grid is kept as it is, without loss


def grids(runs: Sequence[Told]) -> Part:
    """The samples of every evaluation under a slider."""
    parts: list[Html] = []
    for each in runs:
        frames, bad = [], []
        for images, path in evenly(each.grids, GRIDS):
            try:
                content, kind = small(path)
            except Exception as error:  # Pillow raises nearly anything
                bad.append(f"{path}: {' '.join(str(error).split())}")
                continue
            about = f"samples after {images:,} images"
            frames.append((f"{images:,} images seen", image(content, about, kind)))
        if len(runs) > 1:
            parts.append(tag("h3", each.name))
        parts += [paragraph(text, kind="problem") for text in bad]
        parts.append(slider(frames, "images seen") if frames else paragraph("No samples yet."))
    return part("grids", "Samples through training", *parts)


def small(path: Path) -> tuple[bytes, str]:
    """A grid for the page: a PNG as it is if small, else WebP of at most WIDEST pixels.

    Returns:
        The file's content and its kind, png or webp.

    Raises:
        Exception: no image, or too large a one.
    """
    content = read_small(path, LARGEST)
    with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
        opened.load()
        if len(content) <= SHARP:
            return content, "png"
        picture = opened.convert("RGB")
    picture.thumbnail((WIDEST, WIDEST * 4))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=90)
    return out.getvalue(), "webp"
