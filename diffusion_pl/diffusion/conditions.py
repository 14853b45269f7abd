"""Conditions: what a denoiser is told beside the noisy image, in kinds of one or more tensors.

| kind | keys in a batch | null, as if not given |
|---|---|---|
| label | `label` int64 (B,) | -1 |
| text | `text` float (B, L, E), `text_mask` bool (B, L) | no token: the network puts "" there |
| image | `source` float (B, C, H, W), `source_mask` bool (B, 1, H, W) | no pixel is known |
| position | `position` float (B, 2, H, W) | none: the network's own of the whole image |
| augment | `augment` float (B, A) | none: zeros are the image as it is |

A kind with a null is hidden from a share of the images in training (`trainer.dropout`), so that the
model without it is known and guidance may extrapolate from it (Ho & Salimans 2022,
arXiv:2207.12598). A new kind is an entry of KINDS.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_pl.errors import UserError

Condition = Mapping[str, Tensor]


def _no_label(condition: Condition, rows: Tensor | None) -> dict[str, Tensor]:
    label = condition["label"]
    return {"label": torch.full_like(label, -1) if rows is None else label.masked_fill(rows, -1)}


def _no_text(condition: Condition, rows: Tensor | None) -> dict[str, Tensor]:
    mask = condition["text_mask"]
    kept = torch.zeros_like(mask) if rows is None else mask & ~rows[:, None]
    return {"text_mask": kept}


def _no_image(condition: Condition, rows: Tensor | None) -> dict[str, Tensor]:
    mask = condition["source_mask"]
    kept = torch.zeros_like(mask) if rows is None else mask & ~rows[:, None, None, None]
    return {"source_mask": kept}


@dataclass(frozen=True)
class Kind:
    """A kind of condition.

    Args:
        keys: in a batch, each tensor with a row an image.
        size: the network's attribute that says how much of it is taken, 0 for nothing; None: any
            network may be given it.
        null: the tensors that change where rows, bool (B,), are true, or everywhere for None;
            None for a kind that is never hidden.
    """

    keys: tuple[str, ...]
    size: str | None = None
    null: Callable[[Condition, Tensor | None], dict[str, Tensor]] | None = None


KINDS: Mapping[str, Kind] = {
    "label": Kind(("label",), "classes", _no_label),
    "text": Kind(("text", "text_mask"), "text_width", _no_text),
    "image": Kind(("source", "source_mask"), "image_channels", _no_image),
    "position": Kind(("position",)),
    "augment": Kind(("augment",)),
}
HIDEABLE = tuple(name for name, kind in KINDS.items() if kind.null is not None)


def sizes(network: nn.Module | Any) -> dict[str, int]:
    """How much of each kind with a null a network takes: its classes, the width of its text, the
    channels of its images; 0 for nothing."""
    return {name: getattr(network, KINDS[name].size or "", 0) for name in HIDEABLE}


def received(network: nn.Module | Any, batch: Condition) -> dict[str, Tensor]:
    """The conditions in a batch that a network takes; stored half-precision numbers as float32.

    Args:
        batch: also with keys of no kind, which are handed on.
    """
    taken = sizes(network)
    absent = {key for name in HIDEABLE if not taken[name] for key in KINDS[name].keys}
    return {
        key: value.float() if value.dtype == torch.float16 else value
        for key, value in batch.items()
        if key not in absent
    }


def without(
    condition: Condition, kinds: Collection[str], rows: Tensor | None = None
) -> dict[str, Tensor]:
    """A condition with the null of some kinds.

    Args:
        condition: tensors with a row an image.
        kinds: to hide; those that are not given are passed over.
        rows: bool (B,), the images they are hidden from; None: all.
    """
    hidden = dict(condition)
    for name in kinds:
        kind = KINDS[name]
        assert kind.null is not None
        if kind.keys[0] in condition:
            hidden |= kind.null(condition, rows)
    return hidden


def check_dropout(dropout: Mapping[str, float]) -> None:
    """Refuse a dropout of no kind, or out of range.

    Args:
        dropout: share of the images that a kind is hidden from in training, by kind.

    Raises:
        UserError: names it.
    """
    for name, share in dropout.items():
        if name not in HIDEABLE:
            raise UserError(
                f"dropout.{name}: is no condition that can be hidden; there are "
                f"{', '.join(HIDEABLE)}"
            )
        if not 0 <= share <= 1:
            raise UserError(f"dropout.{name} must be in [0, 1] (got {share})")
