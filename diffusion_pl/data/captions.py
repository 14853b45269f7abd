"""What can be seen in synthetic scenes, and their captions, from (seed, scene) alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from diffusion_pl.data.draws import uniforms
from diffusion_pl.data.scenes import GROUNDS, Latents
from diffusion_pl.scene_words import (
    COLOURS,
    KINDS,
    SHAPES,
    SIZES,
    TONES,
    WORDINGS,
    Array,
    Facts,
    caption,
    colour_of,
    hue_and_chroma,
    luma,
)

# A colour has a name if its hue is this far from the next name (turns) and it is so far from grey.
MARGIN, VISIBLE = 0.01, 0.15

_LARGE, _SMALL = 0.35, 0.31  # radii in image sides, of 0.27 to 0.39


def facts(scenes: Latents) -> list[Facts]:
    """The facts of scenes, one each; all that is known but what cannot be seen."""
    colours, near, far = map(_names, (scenes.colour, scenes.near, scenes.far))
    dark = luma(scenes.colour) < 0.5
    found = []
    for i, (label, kind) in enumerate(zip(scenes.label, scenes.ground, strict=True)):
        grounds = [near[i]] if GROUNDS[kind] == "flat" else [near[i], far[i]]
        named = [name for name in grounds if name is not None]
        radius = scenes.radius[i]
        found.append(
            Facts(
                shape=SHAPES[label],
                colour=colours[i],
                tone=TONES[int(dark[i])],
                size=SIZES[0] if radius > _LARGE else SIZES[1] if radius < _SMALL else None,
                ground_tone=TONES[1 - int(dark[i])],
                kind=KINDS[GROUNDS[kind]],
                ground_colours=tuple(dict.fromkeys(named)) if len(named) == len(grounds) else (),
            )
        )
    return found


def _names(colours: Array) -> list[str | None]:
    hue, chroma = hue_and_chroma(colours)
    name, margin = colour_of(hue)
    seen = (margin >= MARGIN) & (chroma >= VISIBLE)
    return [COLOURS[index] if shown else None for index, shown in zip(name, seen, strict=True)]


def captions(scenes: Latents, seed: int, indices: Sequence[int]) -> list[str]:
    """A caption of each scene, in one of WORDINGS.

    Args:
        scenes: n scenes.
        seed: of the set.
        indices: of the scenes, which choose the wordings with the seed.
    """
    drawn = uniforms(seed, "wording", torch.tensor(list(indices), dtype=torch.int64))
    chosen = (drawn * len(WORDINGS)).to(torch.int64).tolist()
    return [
        caption(each, WORDINGS[number]) for each, number in zip(facts(scenes), chosen, strict=True)
    ]


def without(scenes: Latents, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Which scenes are of none of the (shape, colour) pairs, bool (n,)."""
    hue, _ = hue_and_chroma(scenes.colour)
    colour, _ = colour_of(hue)
    kept = np.ones(len(scenes), dtype=bool)
    for shape, name in pairs:
        kept &= (scenes.label != SHAPES.index(shape)) | (colour != COLOURS.index(name))
    return kept
