"""Line plots as SVG: axes, ticks, legends; the colours are those of the page's style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffusion_pl.page.html import Html, joined, tag

COLOURS = 8  # classes c0 to c7 of the style
MOST = 240  # points of a line
DOTTED = 24  # points that are marked
LARGEST = 1e300  # of a value that is drawn, so that no axis overflows
DECADES = 150  # above and below 1, of a logarithmic axis

WIDTH, HEIGHT = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 368, 10, 202  # of the axes

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a plot.

    Args:
        name: in the legend.
        points: (x, y) in the order of x; those that are not finite are left out.
        colour: number of its colour, the same for a run in all plots.
        dashed: drawn so.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """The scale of an axis.

    Args:
        low, high: its ends, low < high.
        log: logarithmic; the ends are then positive.
    """

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the lower end and 1 at the upper."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values between the ends: 1, 2 and 5 times powers of ten."""
        if not self.log:
            return _linear(self.low, self.high)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        decades = [p for p in range(first, last + 1) if self._has(10.0**p)]
        every = -(-len(decades) // 6) or 1  # at most six are written
        found = [10.0**p for p in decades if not p % every]
        if len(found) < 3:
            steps = [m * 10.0**p for p in range(first, last + 1) for m in (1, 2, 5)]
            found = [value for value in steps if self._has(value)]
        return found if len(found) > 1 else _linear(self.low, self.high)

    def _has(self, value: float) -> bool:
        return self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)


def axis_of(values: Sequence[float], log: bool | None = None) -> Axis:
    """An axis for values.

    Args:
        values: finite, at least one.
        log: logarithmic if all are positive; None: where they span more than a decade.
    """
    low, high = min(values), max(values)
    if log is None:
        log = high > 10 * low
    if log and low > 10.0**-DECADES and high < 10.0**DECADES:
        room = max((high / low) ** 0.05, 1.02)
        return Axis(low / room, high * room, log=True)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Axis(max(0.0, low - room) if low >= 0 else low - room, high + room)


def plot(
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    log_x: bool | None = False,
    log_y: bool | None = None,
) -> Html:
    """A plot with its title above and its legend below; "" without a point.

    Args:
        lines: at least one.
        title: of what is on the y axis.
        x: title of the x axis.
        log_x, log_y: see `axis_of`.
    """
    kept = [(line, _thinned(_finite(line.points))) for line in lines]
    points = [point for _, own in kept for point in own]
    if not points:
        return Html("")
    across = axis_of([at for at, _ in points], log_x)
    up = axis_of([value for _, value in points], log_y)
    drawn = joined(_curve(line, own, across, up) for line, own in kept if own)
    picture = tag(
        "svg",
        _frame(across, up, x),
        drawn,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title} by {x}",
    )
    legend = [tag("li", tag("span", line.name), class_=_kind(line)) for line, own in kept if own]
    return tag("figure", tag("figcaption", title), picture, tag("ul", *legend, class_="legend"))


def short(value: float, digits: int = 4) -> str:
    """A tick's number: 40k, 2M, 0.05, 1e-05."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def labels(ticks: Sequence[float]) -> list[str]:
    """The numbers of ticks, with as many digits as tell them apart."""
    for digits in range(4, 13):
        found = [short(value, digits) for value in ticks]
        if len(set(found)) == len(set(ticks)):
            break
    return found


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if abs(x) < LARGEST and abs(y) < LARGEST]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST points, each the mean of neighbours."""
    every = -(-len(points) // MOST)
    pieces = [points[at : at + every] for at in range(0, len(points), max(every, 1))]
    return [
        (math.fsum(x for x, _ in piece) / len(piece), math.fsum(y for _, y in piece) / len(piece))
        for piece in pieces
    ]


def _linear(low: float, high: float) -> list[float]:
    """Four to nine round values between two ends."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    fit = [m * power for m in (1, 2, 5) if m * power <= (high - low) / 4]
    step = max(fit, default=power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _kind(line: Line) -> str:
    return f"c{line.colour % COLOURS}" + (" dashed" if line.dashed else "")


def _place(across: Axis, up: Axis, point: Point) -> Point:
    x = LEFT + (RIGHT - LEFT) * across.share(point[0])
    return round(x, 2), round(BOTTOM - (BOTTOM - TOP) * up.share(point[1]), 2)


def _curve(line: Line, points: Sequence[Point], across: Axis, up: Axis) -> Html:
    places = [_place(across, up, point) for point in points]
    path = " ".join(f"{x:g},{y:g}" for x, y in places)
    curve = tag("polyline", points=path, class_="curve dashed" if line.dashed else "curve")
    dots = [tag("circle", cx=f"{x:g}", cy=f"{y:g}", r=2.5, class_="dot") for x, y in places]
    return tag("g", curve, *(dots if len(dots) <= DOTTED else ()), class_=_kind(line))


def _numbered(axis: Axis) -> Iterable[tuple[float, str]]:
    ticks = axis.ticks()
    return zip(ticks, labels(ticks), strict=True)


def _frame(across: Axis, up: Axis, title: str) -> Html:
    """Axes, grid and numbers."""
    parts = []
    for value, number in _numbered(up):
        _, y = _place(across, up, (across.low, value))
        parts += [
            tag("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="grid"),
            tag("text", number, x=LEFT - 5, y=y + 4, text_anchor="end"),
        ]
    for value, number in _numbered(across):
        x, _ = _place(across, up, (value, up.low))
        parts += [
            tag("line", x1=x, x2=x, y1=BOTTOM, y2=BOTTOM + 4, class_="axis"),
            tag("text", number, x=x, y=BOTTOM + 16, text_anchor="middle"),
        ]
    middle = (LEFT + RIGHT) / 2
    return joined(
        [
            *parts,
            tag("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"),
            tag("line", x1=LEFT, x2=LEFT, y1=TOP, y2=BOTTOM, class_="axis"),
            tag("text", title, x=middle, y=BOTTOM + 33, text_anchor="middle"),
        ]
    )
