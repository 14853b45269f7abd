"""What is said of a synthetic scene: names of colours, captions made of facts, and facts of words.

    CAPTION = OBJECT [on GROUND],  OBJECT = [size] [tone] [colour] shape,
    GROUND = [tone] [kind] [colour [and colour]] ground

A fact that is not visible is not said: a hue close to the boundary of two names has no name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]

SHAPES = ("disc", "ring", "crescent", "heart", "triangle", "square", "cross", "star")
TONES = ("light", "dark")
SIZES = ("large", "small")

# The middle of each name's hues, in turns; a hue has the name of the nearest middle.
HUES = {
    "red": 0.0, "orange": 0.08, "yellow": 0.16, "green": 0.33,
    "teal": 0.50, "blue": 0.64, "purple": 0.77, "pink": 0.90,
}  # fmt: skip
COLOURS = tuple(HUES)

# The kinds of ground and the words for them.
KINDS = {
    "flat": "plain", "linear": "graded", "radial": "glowing",
    "stripes": "striped", "checks": "checked", "blobs": "spotted",
}  # fmt: skip

WORDINGS = (
    "a {size} {tone} {colour} {shape} on a {ground_tone} {kind} {ground_colour} ground",
    "a {tone} {colour} {shape} on a {ground_tone} {ground_colour} ground",
    "one {colour} {shape} on a {ground_tone} background",
    "a picture of a {size} {colour} {shape}",
    "{colour} {shape}, {ground_tone} {kind} ground",
    "a {colour} {shape} on a {kind} {ground_colour} ground",
    "a {tone} {shape}",
    "on a {ground_tone} {ground_colour} ground, a {tone} {colour} {shape}",
    "a {ground_tone} {ground_colour} ground behind a {colour} {shape}",
    "{ground_tone} {ground_colour} background, {colour} {shape}",
)

# For evaluation: training never says it so.
UNSEEN_WORDINGS = (
    "there is a {tone} {colour} {shape} in front of a {ground_tone} ground",
    "a {ground_tone} {ground_colour} background with a {colour} {shape}",
    "the {colour} {shape} and its {ground_tone} background",
    "look at the {tone} {colour} {shape} against the {ground_tone} {ground_colour} ground",
)

_GROUND_NOUNS = ("ground", "background")
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True)
class Facts:
    """What a caption says of a scene; None and () where it says nothing.

    Args:
        shape: of SHAPES.
        colour: of the shape, of COLOURS.
        tone: of the shape, of TONES; the ground has the other one.
        size: of SIZES.
        ground_tone: of TONES.
        kind: of the ground, of KINDS' words.
        ground_colours: one or two of COLOURS.
    """

    shape: str | None = None
    colour: str | None = None
    tone: str | None = None
    size: str | None = None
    ground_tone: str | None = None
    kind: str | None = None
    ground_colours: tuple[str, ...] = ()

    @property
    def tone_of_ground(self) -> str | None:
        """The ground's tone, which that of the shape says too."""
        if self.ground_tone is None and self.tone is not None:
            return TONES[1 - TONES.index(self.tone)]
        return self.ground_tone


def luma(colours: Array) -> Array:
    """Luma (ITU-R BT.601) of RGB colours in [0, 1], (..., 3) -> (...)."""
    return np.asarray(colours @ _LUMA)


def hue_and_chroma(colours: Array) -> tuple[Array, Array]:
    """Hue in turns [0, 1), 0 where there is none, and chroma, max - min; (..., 3) -> (...) each.

    The hexagonal hue of HSV, red 0, green 1/3, blue 2/3.
    """
    red, green, blue = np.moveaxis(np.asarray(colours, dtype=np.float64), -1, 0)
    top = np.maximum(np.maximum(red, green), blue)
    chroma = top - np.minimum(np.minimum(red, green), blue)
    safe = np.where(chroma > 0, chroma, 1.0)
    hue = np.where(
        top == red,
        (green - blue) / safe,
        np.where(top == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    return hue / 6 % 1.0, chroma


def colour_of(hue: Array) -> tuple[npt.NDArray[np.int64], Array]:
    """The name of a hue, an index into COLOURS, and its distance to the nearest boundary in turns.

    Args:
        hue: in turns, any shape.
    """
    middles = np.array(list(HUES.values()))
    away = np.abs(hue[..., None] - middles)
    away = np.minimum(away, 1.0 - away)
    nearest = np.sort(away, axis=-1)
    # The boundary lies midway between two middles.
    return away.argmin(axis=-1), (nearest[..., 1] - nearest[..., 0]) / 2


def caption(facts: Facts, wording: str) -> str:
    """The facts in words; those that are not known are left out.

    Args:
        facts: of a scene; the shape is known.
        wording: one of WORDINGS or UNSEEN_WORDINGS.
    """
    words = wording.format(
        size=facts.size or "",
        tone=facts.tone or "",
        colour=facts.colour or "",
        shape=facts.shape,
        ground_tone=facts.ground_tone or "",
        kind=facts.kind or "",
        ground_colour=" and ".join(facts.ground_colours),
    )
    words = " ".join(words.split())
    return re.sub(r"\ba (?=[aeiou])", "an ", words)


def facts_of(words: str) -> Facts:
    """What words ask for: each adjective belongs to the next noun, a shape or a ground.

    Args:
        words: in any wording; words that are not known say nothing.

    Returns:
        The facts; where something is said twice in different ways, it is not known.
    """
    noun: dict[str, list[str]] = {"shape": [], "ground": []}
    shapes: list[str] = []
    waiting: list[str] = []
    for word in re.findall(r"[a-z]+", words.lower()):
        if word in SHAPES:
            shapes.append(word)
            noun["shape"] += waiting
            waiting = []
        elif word in _GROUND_NOUNS:
            noun["ground"] += waiting
            waiting = []
        else:
            waiting.append(word)
    own, ground = noun["shape"], noun["ground"]
    colours = tuple(dict.fromkeys(word for word in ground if word in COLOURS))
    return Facts(
        shape=_single(shapes, SHAPES),
        colour=_single(own, COLOURS),
        tone=_single(own, TONES),
        size=_single(own, SIZES),
        ground_tone=_single(ground, TONES),
        kind=_single(ground, tuple(KINDS.values())),
        ground_colours=colours if len(colours) <= 2 else (),
    )


def _single(words: Sequence[str], known: Sequence[str]) -> str | None:
    found = {word for word in words if word in known}
    return found.pop() if len(found) == 1 else None
