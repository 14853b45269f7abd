"""Signed distances to eight plane shapes, the foreground of the synthetic data.

Each function takes coordinates in units of the shape's radius, x to the right and y down, and
returns the signed distance to the outline in the same unit, negative inside. Away from corners the
gradient has length 1, which is what makes `0.5 - distance / pixel` the covered part of a pixel.
Only operations that IEEE 754 rounds exactly are used (no sine, no exponential), so the pixels are
the same bytes on every machine. Crescent, heart and star follow I. Quilez, "2D distance functions".
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

# float32 in rendering.
Array = npt.NDArray[np.floating[Any]]

_HALF_SQRT_3 = 0.8660254037844386
_COS_36, _SIN_36 = 0.8090169943749475, 0.5877852522924731


def _length(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y)


def _disc(x: Array, y: Array) -> Array:
    return _length(x, y) - 0.88


def _ring(x: Array, y: Array) -> Array:
    return np.abs(_length(x, y) - 0.7) - 0.22


def _crescent(x: Array, y: Array) -> Array:
    """A disc with a disc bitten out of its right side; 0.02 of offset blunts the two tips."""
    outer, inner, bite = 0.94, 0.77, 0.44
    y = np.abs(y)
    # Where the two circles meet; near it the distance is that to the tip itself.
    tip_x = (outer * outer - inner * inner + bite * bite) / (2.0 * bite)
    tip_y = math.sqrt(outer * outer - tip_x * tip_x)
    near_tip = x * tip_y - y * tip_x > bite * np.maximum(tip_y - y, 0.0)
    arcs = np.maximum(_length(x, y) - outer, inner - _length(x - bite, y))
    return np.where(near_tip, _length(x - tip_x, y - tip_y), arcs) - 0.02


def _heart(x: Array, y: Array) -> Array:
    """Two quarter discs on a square that stands on its corner."""
    scale = 1.55
    x = np.abs(x) / scale
    y = 0.62 - y / scale
    lobe = _length(x - 0.25, y - 0.75) - 0.3535533905932738
    along = 0.5 * np.maximum(x + y, 0.0)
    notch = x * x + (y - 1.0) * (y - 1.0)
    side = (x - along) * (x - along) + (y - along) * (y - along)
    body = np.copysign(np.sqrt(np.minimum(notch, side)), x - y)
    return scale * np.where(x + y > 1.0, lobe, body)


def _triangle(x: Array, y: Array) -> Array:
    """Equilateral, point up; the centre of mass is the origin."""
    return np.maximum(_HALF_SQRT_3 * np.abs(x) - 0.5 * y, y) - 0.5


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.7


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    long, short = np.maximum(x, y), np.minimum(x, y)
    return np.maximum(long - 0.92, short - 0.3)


def _star(x: Array, y: Array) -> Array:
    """Five points, one up: folded along its axes of symmetry onto one edge."""
    x, y = np.abs(x), -y
    fold = 2.0 * np.maximum(_COS_36 * x - _SIN_36 * y, 0.0)
    x, y = x - fold * _COS_36, y + fold * _SIN_36
    fold = 2.0 * np.maximum(-_COS_36 * x - _SIN_36 * y, 0.0)
    x, y = np.abs(x + fold * _COS_36), y + fold * _SIN_36 - 1.0
    # The edge from the point (0, 1) to the inner corner, whose radius is 0.48 of the outer one.
    edge_x, edge_y = 0.48 * _SIN_36, 0.48 * _COS_36 - 1.0
    along = np.clip((x * edge_x + y * edge_y) / (edge_x * edge_x + edge_y * edge_y), 0.0, 1.0)
    return np.copysign(_length(x - edge_x * along, y - edge_y * along), y * edge_x - x * edge_y)


# The label of an image is its shape's place in this table.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": _disc,
    "ring": _ring,
    "crescent": _crescent,
    "heart": _heart,
    "triangle": _triangle,
    "square": _square,
    "cross": _cross,
    "star": _star,
}
