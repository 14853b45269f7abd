"""Several disjoint blocks of seeds, as papers report: mean, least, and how far apart they lie."""

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
    """Measure images 0 to n - 1, n to 2 n - 1, ... apart; see `evaluate`.

    Karras 2022, section 5, reports the least of three such blocks.

    Args:
        blocks: how many, at least 1.
        known: of several, the rows of a block that was finished before, by its number; or none.
        keep: told the rows of each of several as it is finished, so that a later failure loses
            nothing.

    Returns:
        One row a number, its "value" the mean over the blocks when there are several, with "min",
        "spread" (largest less least) and "blocks" beside it; and the first images, None where
        nothing was drawn.

    Raises:
        UserError: no block, or as `evaluate`.
    """
    if blocks < 1:
        raise UserError(f"blocks must be at least 1 (got {blocks})")
    measured = []
    pictures: Tensor | None = None
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
        pictures = shown if pictures is None else pictures
        if keep is not None and blocks > 1:
            keep(block, rows)
    if blocks == 1:
        return measured[0], pictures
    return [summary(rows) for rows in zip(*measured, strict=True)], pictures


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row for the same number of several blocks."""
    values = [row["value"] for row in rows]
    return {
        **rows[0],
        "value": sum(values) / len(values),
        "min": min(values),
        "spread": max(values) - min(values),
        "blocks": values,
        "seconds": round(sum(row["seconds"] for row in rows), 2),
    }
