"""The random process behind the synthetic data: what is in image i, as a short list of numbers.

A scene knows no pixels. The process is symmetric under mirroring left to right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from diffusion_pl.data.shapes import SHAPES, Array

Ground = Literal["flat", "linear", "radial", "stripes", "checks", "blobs"]
GROUNDS: tuple[Ground, ...] = get_args(Ground)

# Uniform numbers an image may use, a multiple of the four that one Philox step gives.
_UNIFORMS = 32


@dataclass(frozen=True, eq=False)
class Latents:
    """Scenes, one per row; lengths in units of the image side, colours RGB in [0, 1].

    Args:
        label: int64 (n,), the shape, an index into SHAPES.
        centre: (n, 2), x and y of the shape, y down.
        radius: (n,), of the circle that holds the shape.
        turn: (n, 2), cosine and sine of the shape's rotation.
        side: (n,), 1 or -1 for a mirrored shape.
        colour: (n, 3), of the shape.
        rim: (n,), how much darker the shape's outline is than its middle.
        ground: int64 (n,), the kind of ground, an index into GROUNDS.
        near: (n, 3), the ground's first colour.
        far: (n, 3), its second colour.
        heading: (n, 2), unit vector along which gradient, stripes and checks run.
        spots: (n, 3, 2), places of the radial gradient (the first) and of the blobs.
        cycles: (n,), periods of stripes and checks over the image side.
        phase: (n, 2), in periods.
    """

    label: npt.NDArray[np.int64]
    centre: Array
    radius: Array
    turn: Array
    side: Array
    colour: Array
    rim: Array
    ground: npt.NDArray[np.int64]
    near: Array
    far: Array
    heading: Array
    spots: Array
    cycles: Array
    phase: Array

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> "Latents":
        return Latents(*(getattr(self, field.name)[rows] for field in fields(self)))


def latents(
    seed: int,
    first: int,
    count: int,
    grounds: Sequence[Ground] = GROUNDS,
    shapes: Sequence[str] = tuple(SHAPES),
) -> Latents:
    """Draw scenes `first` to `first + count - 1`; scene i depends on (seed, i) alone.

    Args:
        seed: 0 to 2**64 - 1.
        first: index of the first scene.
        count: how many.
        grounds: the kinds of ground there may be, names of GROUNDS, each as likely; nothing else of
            a scene changes with them.
        shapes: the same of the shapes, names of SHAPES.
    """
    # Philox counts: scene i owns eight steps of four numbers. Raw bits rather than a Generator's
    # floats, because numpy promises that only the bit generators never change.
    philox = np.random.Philox(key=seed, counter=first * (_UNIFORMS // 4))
    raw = philox.random_raw(count * _UNIFORMS).reshape(count, _UNIFORMS)
    u = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53

    radius = 0.27 + 0.12 * u[:, 1]
    room = (0.49 - radius)[:, None]
    spots = np.stack([u[:, 18:21], u[:, 21:24]], axis=-1)
    # On a light ground the shape is dark and the other way round: at least 0.25 of luma apart.
    light = u[:, 6] < 0.5
    luma_shape = np.where(light, 0.15 + 0.25 * u[:, 7], 0.6 + 0.22 * u[:, 7])
    luma_near = np.where(light, 0.68 + 0.25 * u[:, 8], 0.08 + 0.25 * u[:, 8])
    luma_far = np.where(light, 0.68 + 0.25 * u[:, 9], 0.08 + 0.25 * u[:, 9])
    drawn = {
        "centre": 0.5 + room * (2.0 * u[:, 2:4] - 1.0),
        "radius": radius,
        "turn": _direction((u[:, 4] - 0.5) / 6.0),
        "side": np.where(u[:, 5] < 0.5, -1.0, 1.0),
        "colour": _colour(u[:, 10], luma_shape, 1.0),
        "rim": 0.45 * u[:, 11],
        "near": _colour(u[:, 12], luma_near, 0.7),
        "far": _colour(u[:, 13], luma_far, 0.7),
        "heading": _direction(u[:, 14]),
        "spots": spots,
        "cycles": 1.5 + 1.5 * u[:, 15],
        "phase": u[:, 16:18],
    }
    # Drawn in float64, kept in float32: a sine that differs in the last bit between maths libraries
    # almost never does after rounding.
    single = {name: value.astype(np.float32) for name, value in drawn.items()}
    labels = np.array([list(SHAPES).index(name) for name in shapes])
    label = labels[(u[:, 0] * len(labels)).astype(np.int64)]
    kinds = np.array([GROUNDS.index(name) for name in grounds])
    ground = kinds[(u[:, 24] * len(kinds)).astype(np.int64)]
    return Latents(label=label, ground=ground, **single)


def _direction(turns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Unit vectors (n, 2) at an angle in turns (n,)."""
    return np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], axis=-1)


def _colour(
    hue: npt.NDArray[np.float64], luma: npt.NDArray[np.float64], purity: float
) -> npt.NDArray[np.float64]:
    """The purest colour (n, 3) of a hue in turns and a given luma (ITU-R BT.601), times `purity`.

    Colours of equal luma differ in hue alone, so contrast in luma is contrast to the eye; equal
    HSV values would put yellow beside blue.
    """
    sector = (6.0 * hue[:, None] + np.array([0.0, 4.0, 2.0])) % 6.0
    full = np.clip(np.abs(sector - 3.0) - 1.0, 0.0, 1.0)
    own = (0.299 * full[:, 0] + 0.587 * full[:, 1] + 0.114 * full[:, 2])[:, None]
    wanted = luma[:, None]
    to_white = 1.0 - (1.0 - full) * (1.0 - wanted) / (1.0 - own)
    pure = np.where(wanted > own, to_white, full * wanted / own)
    return purity * pure + (1.0 - purity) * wanted
