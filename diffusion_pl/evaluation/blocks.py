"""Evaluations of several disjoint blocks of images, as papers report: mean, minimum and range."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.measuring import GeneratedImages, Progress, evaluate
from diffusion_pl.evaluation.settings import Evaluation
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.reference import Reference


def evaluate_blocks(
    drawn: GeneratedImages,
    settings: Evaluation,
    extractor: Extractor,
    reference: Reference,
    *,
    blocks: int,
    progress: Progress | None = None,
    known: Callable[[int], list[dict[str, Any]]] | None = None,
    keep: Callable[[int, list[dict[str, Any]]], object] | None = None,
) -> tuple[list[dict[str, Any]], Tensor | None]:
    """Evaluate images 0 to n - 1, n to 2 n - 1, ... separately; see `evaluate`.

    Karras et al. 2022, section 5, report the minimum of three such blocks.

    Args:
        blocks: how many, at least 1.
        known: the rows of a block that was evaluated before, by its number; [] for none.
        keep: called with the number and rows of each finished block, if there are several.

    Returns:
        One row for each number. With several blocks "value" is their mean, beside "min", "range"
        (maximum less minimum) and "blocks". And the first images, None where all was known.

    Raises:
        UserError: `blocks` is below 1, or as `evaluate`.
    """
    if blocks < 1:
        raise UserError(f"blocks must be at least 1 (got {blocks})")
    measured = []
    images: Tensor | None = None
    for block in range(blocks):
        found = known(block) if known is not None and blocks > 1 else []
        if found:
            measured.append(found)
            continue
        rows, shown = evaluate(
            drawn,
            settings,
            extractor,
            reference,
            first=block * settings.count,
            progress=progress,
        )
        measured.append(rows)
        images = shown if images is None else images
        if keep is not None and blocks > 1:
            keep(block, rows)
    if blocks == 1:
        return measured[0], images
    return [summary(rows) for rows in zip(*measured, strict=True)], images


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row from those of the same number in several blocks."""
    values = [row["value"] for row in rows]
    return {
        **rows[0],
        "value": sum(values) / len(values),
        "min": min(values),
        "range": max(values) - min(values),
        "blocks": values,
        "seconds": round(sum(row["seconds"] for row in rows), 2),
    }
