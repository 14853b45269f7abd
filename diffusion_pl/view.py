"""The view of a run on a terminal: made of the rows that a run records, in training and by `watch`.

It is lines of text for any width and height; what there is no room for is left out from below.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rich.text import Text

from diffusion_pl.names import shown

Row = Mapping[str, Any]

KEPT = 4096  # points of the loss curve; beyond, every second one is dropped
WIDE = 120  # columns from which curve and noise levels stand side by side
SMOOTH = 10  # rows whose weight in the smoothed loss is 1 - 1/e
MESSAGES = 50
LOSS_WORDS = {"ema": "averaged", "denoiser": "raw"}


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def is_number(value: Any) -> bool:
    """Whether a value of a row is a finite number."""
    return type(value) in (int, float) and abs(value) < 1e300


def speed_text(images: float) -> str:
    """A speed in images/s."""
    return f"{images:,.1f} images/s" if images < 100 else f"{images:,.0f} images/s"


@dataclass
class RunView:
    """What is known of a run, from its rows.

    Args:
        name: of the run.
        total: images of the budget; 0 where that is not known.
        every: images between evaluations; 0 where that is not known.
        state: a word, such as training or finished.
        about: more of the state, such as where it runs.
        images: seen so far.
        speed: images/s of training now; None: that of the newest row.
        loss: of the newest steps, before there is a row.
        evaluation: images measured, images to measure and seconds since its begin, while one runs.
    """

    name: str
    total: int = 0
    every: int = 0
    state: str = "training"
    about: str = ""
    images: int = 0
    speed: float | None = None
    loss: float | None = None
    evaluation: tuple[int, int, float] | None = None
    newest: Row = field(default_factory=dict)
    smoothed: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    held_out: dict[str, Row] = field(default_factory=dict)
    numbers: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    cost: float = 0.0  # seconds of the newest evaluation
    messages: deque[str] = field(default_factory=lambda: deque(maxlen=MESSAGES))

    def note(self, row: Row) -> None:
        """Take note of a row: of the log, of an evaluation, or a held-out loss."""
        images = row.get("images")
        if type(images) is not int or not 0 <= images < 10**18:
            return
        self.images = max(self.images, images)
        if "name" not in row:
            self._log(images, row)
        elif isinstance(row.get("levels"), list):
            self.held_out[str(row.get("weights"))] = row
        elif is_number(row.get("value")):
            self._measured(images, row)

    def _log(self, images: int, row: Row) -> None:
        self.newest = row
        loss = row.get("loss")
        if not is_number(loss):
            return
        assert loss is not None
        count = min(len(self.curve) + 1, SMOOTH)  # at first the mean of all
        before = self.smoothed
        self.smoothed = loss if before is None else before + (loss - before) / count
        self.curve.append((images, float(loss)))
        if len(self.curve) > KEPT:
            self.curve = self.curve[::2]

    def _measured(self, images: int, row: Row) -> None:
        name = str(row["name"])
        if not name.partition("@")[0].endswith("_std"):
            self.numbers.setdefault(name, []).append((images, float(row["value"])))
        if is_number(row.get("seconds")):
            self.cost = float(row["seconds"])

    def pace(self) -> float:
        """Images/s of training; 0 where that is not known."""
        if self.speed is not None:
            return self.speed
        speed = self.newest.get("images_per_second")
        return float(speed) if is_number(speed) and speed else 0.0

    def seconds_to_evaluation(self) -> float | None:
        """Until the next evaluation begins."""
        if not self.every or not self.pace() or self.images >= self.total:
            return None
        following = min((self.images // self.every + 1) * self.every, self.total)
        return (following - self.images) / self.pace()

    def seconds_left(self) -> float | None:
        """Until the end, with the evaluations that are to come."""
        if not self.total or not self.pace() or self.images > self.total:
            return None
        coming = 0
        if self.every and self.images < self.total:
            coming = (self.total - 1) // self.every - self.images // self.every + 1
        return (self.total - self.images) / self.pace() + coming * self.cost

    def lines(self, width: int, height: int) -> list[Text]:
        """The view.

        Args:
            width: columns, at most so many characters a line.
            height: lines, at most so many.
        """
        head = [self._title(width), self._bar(width), *self._facts(width)]
        if self.evaluation is not None:
            head.append(self._evaluation())
        numbers = self._numbers(width, 9 if height >= 40 else 3)
        messages = self._messages(3 if height >= 40 else 1)
        room = height - len(head) - len(numbers) - len(messages)
        if width >= WIDE:
            left, right = (width - 3) * 3 // 5, width - 3 - (width - 3) * 3 // 5
            tall = max(min(room - 1, 24), 0)
            middle = beside(self._curve(left, tall), self._levels(right, tall), left)
        else:
            levels = self._levels(width, 4 if room < 18 else 12)
            curve = self._curve(width, min(room - len(levels) - 3, 14))
            middle = [*curve, *([Text()] if curve and levels else []), *levels]
        parts = [head, middle, numbers, messages]
        spaced: list[Text] = []
        for part in parts:
            if part and spaced:
                spaced.append(Text())
            spaced += part
        for line in spaced:
            line.truncate(width, overflow="ellipsis")
        return spaced[:height]

    def _title(self, width: int) -> Text:
        style = {"failed": "bold red", "finished": "bold green", "unreadable": "bold red"}
        title = Text(shown(self.name), style="bold")
        state = Text(shown(self.state), style=style.get(self.state, "bold cyan"))
        if self.about:
            state.append(f"  {shown(self.about)}", style="dim")
        title.truncate(max(width - len(state) - 2, width // 3), overflow="ellipsis")
        state.truncate(width - len(title) - 2, overflow="ellipsis")
        return _line(title, Text(" " * max(width - len(title) - len(state), 2)), state)

    def _bar(self, width: int) -> Text:
        if not self.total:
            return Text(f"{self.images:,} images seen")
        share = min(self.images / self.total, 1.0)
        words = f"  {math.floor(100 * share)} %  {self.images:,} of {self.total:,} images"
        room = max(width - len(words), 4)
        done = round(room * share)
        left = Text("━" * (room - done), style="bright_black")
        return _line(Text("━" * done, style="cyan"), left, Text(words))

    def _facts(self, width: int) -> list[Text]:
        """What is now, in pairs of a word and its value."""
        facts = {
            "speed": speed_text(self.pace()) if self.pace() else "",
            "loss": self._loss(),
            "ends in": _clock(self.seconds_left()) if self.state == "training" else "",
            "gradient": _joined(self.newest, ("gradient_norm", "norm {:.3g}"),
                                ("learning_rate", "rate {:.3g}")),
            "evaluation": self._next() if self.state == "training" else "",
            "memory": _joined(self.newest, ("memory_gb", "{:.3g} GB"), ("mfu", "MFU {:.0%}"),
                              ("data_wait", "data wait {:.0%}")),
        }  # fmt: skip
        known = [(word, value) for word, value in facts.items() if value]
        columns = 3 if width >= WIDE else 2
        room = width // columns
        found = []
        for first in range(0, len(known), columns):
            line = Text()
            for word, value in known[first : first + columns]:
                cell = _line(Text(f"{word} ", style="dim"), Text(value))
                cell.truncate(room - 1, overflow="ellipsis")
                cell.pad_right(room - len(cell))
                line.append_text(cell)
            found.append(line)
        return found

    def _loss(self) -> str:
        if self.smoothed is None:
            return "" if self.loss is None else f"{self.loss:.4g} in the newest steps"
        newest = self.curve[-1][1]
        return f"{newest:.4g}, smoothed {self.smoothed:.4g}"

    def _next(self) -> str:
        seconds = self.seconds_to_evaluation()
        if seconds is None or self.evaluation is not None:
            return ""
        return f"in {clock(seconds)}" + (f", takes {clock(self.cost)}" if self.cost >= 1 else "")

    def _evaluation(self) -> Text:
        assert self.evaluation is not None
        done, total, seconds = self.evaluation
        words = Text(evaluation_text(done, total, seconds))
        return _line(Text("evaluation ", style="dim"), words)

    def _curve(self, width: int, height: int) -> list[Text]:
        """The training loss by the images seen, on a logarithmic axis."""
        points = [(x, y) for x, y in self.curve if y > 0]
        if len(points) < 2 or height < 3:
            return []
        values = [y for _, y in points]
        last = max(self.total, points[-1][0])
        title = _line(Text("training loss", style="bold"))
        title.append(f"  {max(values):.3g} to {min(values):.3g}, {len(points)} rows", style="dim")
        drawn = braille(points, (0, last), width, height - 1)
        return [title, *(Text(line, style="cyan") for line in drawn)]

    def _levels(self, width: int, height: int) -> list[Text]:
        """The held-out loss by noise level; a table, or bars where there is room."""
        rows = {kind: self.held_out[kind] for kind in LOSS_WORDS if kind in self.held_out}
        curves = {kind: _levels_of(row) for kind, row in rows.items()}
        curves = {kind: levels for kind, levels in curves.items() if levels}
        if not curves or height < 4:
            return []
        first = rows[next(iter(curves))]
        title = _line(Text("held-out loss", style="bold"))
        for kind in curves:
            title.append(f"  {LOSS_WORDS[kind]} {_number(rows[kind].get('value'))}")
        images = first.get("images")
        seen = f" at {images:,}" if type(images) is int else ""
        trained = "" if first.get("held_out") else ", trained on"
        title.append(f"{seen}, {shown(str(first.get('data', '')))}{trained}", style="dim")
        if height < 1 + len(next(iter(curves.values()))) * len(curves):
            return [title, *_table(curves, width)]
        return [title, *_bars(curves, width)][:height]

    def _numbers(self, width: int, most: int) -> list[Text]:
        """The newest numbers, and those before."""
        found = []
        for name, values in list(self.numbers.items())[:most]:
            word, _, rest = name.partition("@")
            line = Text(f"{shown(word)}@{shown(rest)} ")
            line.truncate(max(width - 34, width // 2), overflow="ellipsis")
            line.append(f"{values[-1][1]:.4g}", style="bold")
            line.append(f" at {values[-1][0]:,}", style="dim")
            for images, value in reversed(values[-6:-1]):
                more = f"  {value:.4g} at {images:,}"
                if len(line) + len(more) > width:
                    break
                line.append(more, style="dim")
            found.append(line)
        return found

    def _messages(self, most: int) -> list[Text]:
        return [Text(shown(line), style="yellow") for line in list(self.messages)[-most:]]


def evaluation_text(done: int, total: int, seconds: float) -> str:
    """How far an evaluation is; of the time left nothing is known before its first images."""
    text = f"{done:,}/{total:,} images measured"
    if done:
        text += f"  {clock(seconds * (total - done) / done)} left"
    return text


def _line(*parts: Text) -> Text:
    """Parts in a line, each in its own style."""
    line = Text()
    for part in parts:
        line.append_text(part)
    return line


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else clock(seconds)


def _number(value: Any) -> str:
    return f"{value:.4g}" if is_number(value) else "-"


def _joined(row: Row, *parts: tuple[str, str]) -> str:
    """What a row has of some numbers, each by its pattern."""
    return ", ".join(form.format(row[key]) for key, form in parts if is_number(row.get(key)))


def _levels_of(row: Row) -> list[tuple[float, float]]:
    """Noise level and loss of a row, those that are numbers."""
    levels = [level for level in row.get("levels", ()) if isinstance(level, Mapping)]
    return [
        (float(level["sigma"]), float(level["loss"]))
        for level in levels
        if is_number(level.get("sigma")) and is_number(level.get("loss"))
    ]


def _table(curves: Mapping[str, Sequence[tuple[float, float]]], width: int) -> list[Text]:
    """A column a level, as many as there is room for, evenly."""
    levels = next(iter(curves.values()))
    count = min(len(levels), max((width - 9) // 8, 1))
    picked = [round(i * (len(levels) - 1) / max(count - 1, 1)) for i in range(count)]
    lines = [Text("sigma    " + "".join(f"{levels[i][0]:>8.3g}" for i in picked), style="dim")]
    for kind, curve in curves.items():
        cells = "".join(f"{curve[i][1]:>8.3g}" for i in picked if i < len(curve))
        lines.append(_line(Text(f"{LOSS_WORDS[kind]:9}", style="dim"), Text(cells)))
    return lines


def _bars(curves: Mapping[str, Sequence[tuple[float, float]]], width: int) -> list[Text]:
    """A bar a level and kind of weights, up to the largest loss, at least 1."""
    most = max(1.0, *(loss for curve in curves.values() for _, loss in curve))
    room = max(width - 32, 4)
    lines = []
    for place, (sigma, _) in enumerate(next(iter(curves.values()))):
        for number, (kind, curve) in enumerate(curves.items()):
            if place >= len(curve):
                continue
            loss = curve[place][1]
            label = f"sigma {sigma:<8.3g}" if not number else " " * 14
            bar = "█" * max(round(room * max(loss, 0.0) / most), 1)
            drawn = Text(bar, style="cyan" if kind == "ema" else "bright_black")
            words = Text(f"{label} {LOSS_WORDS[kind]:8}", style="dim")
            lines.append(_line(words, Text(f"{loss:>7.3g} "), drawn))
    return lines


def beside(left: Sequence[Text], right: Sequence[Text], width: int) -> list[Text]:
    """Two blocks of lines side by side, the left one of a width."""
    if not left:
        return list(right)
    found = []
    for number in range(max(len(left), len(right))):
        line = left[number].copy() if number < len(left) else Text()
        line.truncate(width, overflow="ellipsis")
        if number < len(right):
            line = _line(line, Text(" " * (width - len(line) + 3)), right[number])
        found.append(line)
    return found


def braille(
    points: Sequence[tuple[float, float]], reach: tuple[float, float], width: int, height: int
) -> list[str]:
    """A curve as lines of braille characters, 2 x 4 dots each; the vertical axis is logarithmic.

    Args:
        points: x in order and y > 0, at least one.
        reach: x at the left and right end.
        width: characters.
        height: lines.
    """
    low = math.log(min(y for _, y in points))
    span = math.log(max(y for _, y in points)) - low or 1.0
    across, down = 2 * width, 4 * height
    columns: dict[int, list[int]] = {}
    for x, y in points:
        column = round((x - reach[0]) / ((reach[1] - reach[0]) or 1) * (across - 1))
        dot = round((1 - (math.log(y) - low) / span) * (down - 1))
        columns.setdefault(min(max(column, 0), across - 1), []).append(dot)
    heights = {column: sum(dots) / len(dots) for column, dots in columns.items()}
    known = sorted(columns)
    for left, right in pairwise(known):  # straight lines between the points
        for column in range(left + 1, right):
            share = (column - left) / (right - left)
            heights[column] = heights[left] + share * (heights[right] - heights[left])
    cells = [[0] * width for _ in range(height)]
    before = round(heights[known[0]])
    for column in sorted(heights):
        reached = [*columns.get(column, ()), round(heights[column]), before]
        before = round(heights[column])
        for dot in range(min(reached), max(reached) + 1):
            cells[dot // 4][column // 2] |= _DOTS[dot % 4][column % 2]
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a cell, by row and column

_ASCII = {"━": "-", "█": "#", "…": "~"}


def as_ascii(lines: Iterable[Text]) -> list[Text]:
    """The lines for a terminal that knows ASCII alone."""

    def plain(sign: str) -> str:
        return sign if sign.isascii() else _ASCII.get(sign, " " if sign == "\u2800" else "*")

    found = []
    for line in lines:
        copy = line.copy()
        copy.plain = "".join(map(plain, line.plain))
        found.append(copy)
    return found
