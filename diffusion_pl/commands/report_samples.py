"""The parts of a report that show what was sampled for it: classes, a film, nearest images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from diffusion_pl.commands.report_drawn import Copies, Drawn
from diffusion_pl.commands.report_read import Told
from diffusion_pl.images import grid, png_bytes
from diffusion_pl.metrics.memorised import SIDE
from diffusion_pl.page.html import Html, Part, figure, image, paragraph, part, slider, table, tag
from diffusion_pl.page.plots import Line, plot

FILM_COLUMNS = 4


def samples(runs: Sequence[Told], made: Sequence[Drawn]) -> Part:
    """What each class looks like under its name, or each prompt."""
    parts: list[object] = []
    for each, own in zip(runs, made, strict=True):
        parts.append(_title(each, runs))
        if "samples" in own.left:
            parts.append(_left(own.left["samples"]))
            continue
        parts.append(paragraph(own.about, kind="note"))
        figures = [
            figure(_picture(images, name or "samples", _columns(images)), name)
            for name, images in own.groups
        ]
        single = all(len(images) == 1 for _, images in own.groups)
        kind = "slider" if len(figures) == 1 else "tiles" if single else "strips"
        parts.append(tag("div", *figures, class_=kind))
    return part("samples", "Samples by class or prompt", *parts)


def film(runs: Sequence[Told], made: Sequence[Drawn]) -> Part:
    """Progressive denoising as a film: the network's guess of the images at each noise level."""
    parts: list[object] = [
        paragraph(
            "The denoised images D(x; sigma) along the sampler's levels, and the images at last "
            "(Ho et al. 2020, section 4.3).", kind="note",
        )
    ]  # fmt: skip
    for each, own in zip(runs, made, strict=True):
        parts.append(_title(each, runs))
        if "film" in own.left:
            parts.append(_left(own.left["film"]))
            continue
        frames = [(level, _picture(images, level, FILM_COLUMNS)) for level, images in own.film]
        parts.append(slider(frames, "noise level"))
    return part("film", "A film of denoising", *parts)


def neighbours(runs: Sequence[Told], made: Sequence[Drawn]) -> Part:
    """The nearest training images of samples, and whether the samples are copies."""
    parts: list[object] = []
    for each, own in zip(runs, made, strict=True):
        parts.append(_title(each, runs))
        if own.copies is None:
            parts.append(_left(own.left.get("nearest", "nothing was sampled")))
        else:
            parts += _neighbours(own.copies)
    return part("nearest", "Nearest training images", *parts)


def _neighbours(found: Copies) -> list[Html]:
    among = f"{found.searched:,}" + f" of {found.total:,}" * (found.searched < found.total)
    mirrored = " and their mirror images" * found.mirrored
    text = (
        f"Distance: root mean square over the pixels (at most {SIDE} px, larger images by the "
        f"mean over areas), among {among} training images{mirrored}. Ratio: the distance to the "
        "nearest over that to the second nearest; below 1/3 a sample counts as memorised (Yoon et "
        "al. 2023). Baseline: as many training images against the others. Copies of an image that "
        "is in the data twice are not found by it."
    )
    head = ["", "number", "memorised", "median ratio", "lowest ratio", "median distance"]
    rows = [
        (None, [
            name, f"{len(own.ratios):,}", f"{100 * own.memorised:.1f} %",
            *(f"{float(value):.3g}" for value in (
                own.ratios.median(), own.ratios.min(), own.distances[:, 0].median()
            )),
        ])
        for name, own in (("samples", found.samples), ("training images", found.others))
    ]  # fmt: skip
    lines = [
        Line("samples", steps_of(found.samples.ratios), 0),
        Line("training images (baseline)", steps_of(found.others.ratios), 1, dashed=True),
    ]
    strips = [
        figure(_picture(strip, "a sample and its two nearest training images", 3),
               f"ratio {ratio:.3g}")
        for ratio, strip in found.strips
    ]  # fmt: skip
    shown = "The samples of the lowest ratios, each left of its two nearest training images:"
    return [
        paragraph(text, kind="note"),
        table(head, rows),
        tag("div", plot(lines, title="share of images with at most this ratio", x="ratio",
                        log_y=False), class_="plots"),
        paragraph(shown),
        tag("div", *strips, class_="strips"),
    ]  # fmt: skip


def _title(run: Told, runs: Sequence[Told]) -> Html | str:
    return tag("h3", run.name) if len(runs) > 1 else ""


def _left(why: str) -> Html:
    return paragraph(f"left out: {why}", kind="problem")


def _columns(images: Tensor) -> int:
    """Images a row: short rows of a class, else about as many as rows."""
    count = len(images)
    return count if count <= 5 else math.ceil(math.sqrt(count))


def _picture(images: Tensor, about: str, columns: int) -> Html:
    """Images in rows, as a PNG."""
    array = grid(images, columns=columns).permute(1, 2, 0).numpy()
    return image(png_bytes(array), about)


def steps_of(ratios: Tensor) -> list[tuple[float, float]]:
    """The share of ratios at or below each value: the empirical distribution's corners."""
    ordered = sorted(value for value in ratios.tolist() if math.isfinite(value))
    corners = [(0.0, 0.0)]
    for place, value in enumerate(ordered):
        corners += [(value, place / len(ordered)), (value, (place + 1) / len(ordered))]
    return [*corners, (1.0, 1.0)]
