"""Whether images of synthetic scenes show what their captions ask for, judged from the pixels.

| fact | judged by |
|---|---|
| shape | the embedded classifier (metrics/shapes.py), of all eight shapes |
| tone | the ground's: the border's median luma, light above 1/2 |
| colour | the object's: the nearest of eight named hues to that of the mean object pixel |
| ground | hue of the border's median colour |

The object's pixels are those whose luma differs from the border's median by more than half of the
largest difference. A caption is right where every fact that it names is. The control `shuffled`
is the same judgement of every image against the captions of all others: the mean over all shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.metrics import shapes
from diffusion_pl.metrics.features import Extractor, Features, require_rgb, tile
from diffusion_pl.metrics.reference import Reference
from diffusion_pl.scene_words import COLOURS, SHAPES, TONES, colour_of, facts_of, hue_and_chroma

if TYPE_CHECKING:
    from diffusion_pl.metrics.accumulated import Kept

# The answers that there are to each question; a caption's or an image's answer is its index.
ANSWERS = {"shape": SHAPES, "colour": COLOURS, "tone": TONES, "ground": COLOURS}

UNASKED = -1


def asked(captions: Sequence[str]) -> Tensor:
    """What captions ask for, int64 (n, 4): an index into each of ANSWERS, UNASKED for nothing.

    The colour of a ground is asked for where the caption names one alone, of a plain ground.
    """
    rows = []
    for facts in map(facts_of, captions):
        plain = facts.kind in (None, "plain") and len(facts.ground_colours) == 1
        ground = facts.ground_colours[0] if plain else None
        given = (facts.shape, facts.colour, facts.tone_of_ground, ground)
        rows.append(
            [
                UNASKED if answer is None else known.index(answer)
                for answer, known in zip(given, ANSWERS.values(), strict=True)
            ]
        )
    return torch.tensor(rows, dtype=torch.int64)


def seen(images: Tensor, judge: Extractor) -> Tensor:
    """What images show, int64 (n, 4), on the CPU: an index into each of ANSWERS.

    Args:
        images: uint8 (n, C, H, W), n up to features.TILE.
        judge: the embedded classifier.
    """
    logits = tile(judge, images).logits
    assert logits is not None
    rgb = require_rgb(images).cpu().numpy().transpose(0, 2, 3, 1) / 255.0
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    edge = np.ones(luma.shape[1:], dtype=bool)
    edge[1:-1, 1:-1] = False
    border = np.median(rgb[:, edge], axis=1)
    tone = np.median(luma[:, edge], axis=1)
    away = np.abs(luma - tone[:, None, None])
    thing = (away > away.max(axis=(1, 2), keepdims=True) / 2)[..., None]
    colour = (rgb * thing).sum(axis=(1, 2)) / np.maximum(thing.sum(axis=(1, 2)), 1)
    named = [torch.from_numpy(colour_of(hue_and_chroma(each)[0])[0]) for each in (colour, border)]
    dark = torch.from_numpy((tone <= 0.5).astype(np.int64))
    return torch.stack([logits.argmax(1).cpu(), named[0], dark, named[1]], dim=1)


def agreement(asked: Tensor, seen: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
    """The shares of captions that are right.

    Args:
        asked: int64 (n, 4), as `asked`.
        seen: int64 (n, 4), as `seen`.

    Returns:
        "agreement", of all that is asked for, and "agreement_shape", ... of those who ask for it,
        each in [0, 1]; and by the same names how many ask, the level of blind guessing, and
        the agreement with all other captions.

    Raises:
        UserError: no caption asks for anything that is judged.
    """
    wanted = asked != UNASKED
    if not wanted.any():
        raise UserError(
            f"agreement: no caption names a shape ({', '.join(SHAPES)}), a colour "
            f"({', '.join(COLOURS)}) or a tone ({', '.join(TONES)}) that could be judged"
        )
    guess = torch.tensor([1 / len(known) for known in ANSWERS.values()], dtype=torch.float64)
    columns = {f"agreement_{name}": [place] for place, name in enumerate(ANSWERS)}
    values: dict[str, float] = {}
    notes: dict[str, dict[str, float]] = {"asked": {}, "chance": {}, "shuffled": {}}
    for name, places in {"agreement": list(range(len(ANSWERS))), **columns}.items():
        asks = wanted[:, places].any(dim=1)
        if not asks.any():
            continue
        mine, wants = asked[asks][:, places], wanted[asks][:, places]
        right = ((mine[:, None] == seen[None, :, places]) | ~wants[:, None]).all(dim=2)
        own = right[torch.arange(len(mine)), asks.nonzero()[:, 0]].double()
        values[name] = own.mean().item()
        notes["asked"][name] = len(mine)
        notes["chance"][name] = torch.where(wants, guess[places], 1.0).prod(dim=1).mean().item()
        if len(seen) > 1:
            others = (right.double().sum(dim=1) - own) / (len(seen) - 1)
            notes["shuffled"][name] = others.mean().item()
    return values, notes


@dataclass(frozen=True)
class _Judged:
    """What is kept of each image: the four facts asked for, then the four seen."""

    judge: Extractor

    def __call__(self, features: Features) -> Tensor:
        assert features.images is not None and features.captions is not None
        self.judge.to(features.images.device)
        rows = [asked(features.captions), seen(features.images, self.judge)]
        return torch.cat(rows, dim=1).to(features.images.device, torch.float32)


def _measure(rows: Tensor, warning: str | None = None) -> tuple[dict[str, float], dict[str, Any]]:
    both = rows.cpu().to(torch.int64)
    values, notes = agreement(both[:, : len(ANSWERS)], both[:, len(ANSWERS) :])
    return values, notes if warning is None else notes | {"warning": warning}


def foreign(name: str) -> str | None:
    """What to doubt of the judge on images of a data set; None for synthetic scenes.

    Args:
        name: of the data set; that of scenes begins with "synthetic".
    """
    if name.startswith("synthetic"):
        return None
    return f"the judge was made for synthetic scenes, and {name} may be none: see docs/text.md"


@dataclass(frozen=True)
class Agreement:
    """Settings: there are none."""

    wants_features = False
    wants_captions = True

    def numbers(self, extractor: Extractor) -> tuple[str, ...]:
        """Names of the numbers: of all facts together, then of each."""
        return ("agreement", *(f"agreement_{name}" for name in ANSWERS))

    def check_count(self, generated: int, real: int | None = None) -> None:
        """Any number will do."""

    def build(self, extractor: Extractor, reference: Reference | None, count: int) -> Kept:
        """The metric; it takes the embedded classifier, whatever the extractor."""
        from diffusion_pl.metrics.accumulated import Kept  # torchmetrics: 5 s of CPU

        warning = None if reference is None else foreign(reference.name)
        measure = partial(_measure, warning=warning)
        return Kept(_Judged(shapes.load()), 2 * len(ANSWERS), measure)
