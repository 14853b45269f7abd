"""Data sets of images, conversion between uint8 and [-1, 1], grids and PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.io.files import write_atomically
from diffusion_pl.names import shown


class Store(Protocol):
    """Pixels by index."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, R, R), known without decoding."""
        ...

    def read(self, indices: Tensor, /) -> Tensor:
        """Images by index, in the order asked for.

        Args:
            indices: int64 (n,), each in [0, N), repeats allowed.

        Returns:
            uint8 (n, C, R, R), values 0..255.
        """
        ...


class Texts(Protocol):
    """Captions of the images of a set, and the token states that a frozen encoder gives them."""

    @property
    def encoder(self) -> str:
        """The name of the encoder."""
        ...

    @property
    def digest(self) -> str:
        """sha256 (hex) of the encoder's weights."""
        ...

    @property
    def width(self) -> int:
        """E, numbers a token."""
        ...

    @property
    def length(self) -> int:
        """L, tokens that a caption is padded or was cut to."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of encoder, length and captions."""
        ...

    @property
    def null(self) -> tuple[Tensor, Tensor]:
        """The encoding of "": float16 (L, E) and bool (L,)."""
        ...

    def captions_of(self, image: int, /) -> tuple[str, ...]:
        """The captions of an image; () where it has none."""
        ...

    def caption(self, image: int, choice: float, /) -> str:
        """The caption that `read` takes; "" for an image without."""
        ...

    def read(self, images: Tensor, choice: Tensor, /) -> tuple[Tensor, Tensor]:
        """Token states of one caption an image.

        Args:
            images: int64 (n,), each in [0, N).
            choice: float64 (n,) in [0, 1); picks among several captions.

        Returns:
            float16 (n, L, E), zero where there is no token, and bool (n, L), True where there is
            one: nowhere for an image without captions.
        """
        ...


class ImageDataset(Store, Protocol):
    """A fixed, ordered set of square images with optional labels: to train on, or to measure.

    A class that inherits from this one needs `name`, `fingerprint`, `shape` and `read`.

    Args:
        name: printed with every number computed on the set.
        fingerprint: sha256 (hex) of images and labels.
        labels: int64 (N,) in [0, classes), or None when unlabelled.
        classes: number of classes, 0 when unlabelled.
        class_names: in order, () where there are none.
        shards: images in each shard, in order; () where there are none.
        window: shards to shuffle together; 0: all.
        texts: captions and their token states, or None where they are not read.
    """

    name: str
    fingerprint: str
    labels: Tensor | None = None
    classes: int = 0
    class_names: tuple[str, ...] = ()
    shards: tuple[int, ...] = ()
    window: int = 0
    texts: Texts | None = None

    def origin(self, index: int) -> str:
        """The file of an image, for messages; the set's name where there is none."""
        return self.name

    def stand_ins(self, indices: Tensor) -> Tensor:
        """The images that `read` gives: others where it has replaced broken ones."""
        return indices

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def channels(self) -> int:
        """Colour channels of an image."""
        return self.shape[1]

    @property
    def resolution(self) -> int:
        """Side of an image in pixels."""
        return self.shape[3]


@dataclass(frozen=True, eq=False)
class Images(ImageDataset):
    """Images in memory, or read from a store on demand.

    Args:
        store: the images, uint8 (N, C, R, R), or where they are read.
        name, fingerprint, labels, classes, class_names, shards, window, texts: as in
            `ImageDataset`.
    """

    name: str
    store: Tensor | Store
    fingerprint: str
    labels: Tensor | None = None
    classes: int = 0
    class_names: tuple[str, ...] = ()
    shards: tuple[int, ...] = ()
    window: int = 0
    texts: Texts | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, R, R)."""
        return self.store.shape

    def read(self, indices: Tensor) -> Tensor:
        """uint8 (n, C, R, R) by int64 indices (n,)."""
        if isinstance(self.store, Tensor):
            # Whole images are copied at a time, in a twentieth of the time of indexing.
            return self.store.index_select(0, indices)
        return self.store.read(indices)


def from_bytes(images: Tensor) -> Tensor:
    """Map uint8 to float32 in [-1, 1]: x = u / 127.5 - 1, the scale of all four papers.

    Args:
        images: uint8, any shape.

    Returns:
        float32 of the same shape and memory format.

    Raises:
        UserError: the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise UserError(f"images.from_bytes: images must be uint8 (got {images.dtype})")
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def to_bytes(images: Tensor) -> Tensor:
    """Quantise [-1, 1] to uint8, the only place where the package does so.

    u = floor(127.5 x + 128) clipped to 0..255: rounding to the nearest level, as in EDM's released
    code (Karras et al. 2022). Evaluated and saved images are both quantised here.

    Args:
        images: floating point, any shape; values outside [-1, 1] are clipped.

    Returns:
        uint8 of the same shape.
    """
    return images.mul(127.5).add_(128.0).clamp_(0.0, 255.0).to(torch.uint8)


VISIBLE = 64  # pixels to which small images are magnified in a grid
READABLE = 96  # the same with words below them
POINTS, LINE, LINES = 10, 12, 4  # of words: size of type, pixels a line, lines at most
NAMES = 120  # pixels at most for the names left of rows


def grid(
    images: Tensor,
    columns: int | None = None,
    gap: int = 2,
    zoom: int | None = None,
    words: Sequence[str] | None = None,
) -> Tensor:
    """Arrange images in rows from left to right on a white sheet.

    Args:
        images: uint8 (B, C, H, W), C = 1, 3 or 4 (with alpha).
        columns: images per row; about the square root of B when not given.
        gap: white pixels between images.
        zoom: magnification; up to at least 64 pixels when not given, 96 with words.
        words: to write below each image, four short lines at most.

    Returns:
        uint8 (3 or 4, rows * (H + gap) - gap, columns * (W + gap) - gap), H, W after the zoom, H
        with the words.
    """
    zoom = zoom or max(1, math.ceil((READABLE if words else VISIBLE) / images.shape[3]))
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    if words:
        images = torch.cat([images.cpu(), _written(words, images)], dim=2)
    count, channels, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    sides = rows * (height + gap) - gap, columns * (width + gap) - gap
    sheet = torch.full((max(3, channels), *sides), 255, dtype=torch.uint8)
    for index, image in enumerate(images.cpu()):
        top = index // columns * (height + gap)
        left = index % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = image  # broadcasts one channel
    return sheet


def sheet(images: Tensor, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Tensor:
    """Arrange images in named rows and columns on a white sheet, magnified as by `grid`.

    Args:
        images: uint8 (R, K, C, H, W), C = 1, 3 or 4.
        rows: R names, left of the rows; () for none.
        columns: K names, above the columns; () for none.

    Returns:
        uint8 (3 or 4, height, width).
    """
    count, across = images.shape[:2]
    body = grid(images.flatten(0, 1), columns=across)
    zoom = max(1, math.ceil(VISIBLE / images.shape[4]))
    channels, height, width = images.shape[2], images.shape[3] * zoom, images.shape[4] * zoom
    if columns:
        heads = _written(columns, torch.empty(across, channels, height, width))
        body = torch.cat([grid(heads, columns=across, zoom=1), body], dim=1)
    if rows:
        font = ImageFont.load_default(POINTS)
        wide = min(NAMES, 2 + math.ceil(max(font.getlength(shown(name)) for name in rows)) + 2)
        names = _written(rows, torch.empty(count, channels, height, wide))[:, :, :height]
        above = (height - names.shape[2]) // 2
        below = height - names.shape[2] - above
        names = F.pad(names, (0, 0, above, below), value=255)
        left = grid(names, columns=1, zoom=1)
        left = F.pad(left, (0, 2, body.shape[1] - left.shape[1], 0), value=255)
        body = torch.cat([left, body], dim=2)
    return body


def titled(image: Tensor, words: str) -> Tensor:
    """An image, uint8 (C, H, W), with a line of words above it, uint8 (C, H + h, W)."""
    return torch.cat([_written([words], image[None])[0], image], dim=1)


def _written(words: Sequence[str], images: Tensor) -> Tensor:
    """Words in black on white, uint8 (B, C, h, W) for images of that C and W."""
    font = ImageFont.load_default(POINTS)
    width = images.shape[3] - 2
    split = [_lines(each, lambda line: font.getlength(line) <= width) for each in words]
    strips = []
    for lines in split:
        strip = Image.new("L", (images.shape[3], LINE * max(map(len, split)) + 2), 255)
        ImageDraw.Draw(strip).multiline_text((1, 0), "\n".join(lines), 0, font, spacing=2)
        strips.append(torch.from_numpy(np.array(strip)))
    written = torch.stack(strips)[:, None].repeat(1, images.shape[1], 1, 1)
    written[:, 3:] = 255  # opaque
    return written


def _lines(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Lines that fit, broken between words where possible; what is left out becomes an ellipsis."""
    lines, rest = [""], shown(text).split()
    while rest:
        word = rest.pop(0)
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer):
            lines[-1] = longer
        elif lines[-1] and len(lines) < LINES:
            lines.append("")
            rest.insert(0, word)
        else:
            kept = longer
            while kept and not fits(f"{kept}…"):
                kept = kept[:-1]
            lines[-1] = f"{kept}…"
            break
    return lines


def save_png(image: Tensor, path: Path) -> None:
    """Write one image without loss, whole or not at all.

    Args:
        image: uint8 (C, H, W), C = 1, 3 or 4 (with alpha).
        path: the file; its folder is made.

    Raises:
        UserError: it cannot be written.
    """
    content = png_bytes(image.cpu().permute(1, 2, 0).numpy())
    write_atomically(path, lambda file: file.write(content))


def png_bytes(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Pixels, uint8 (H, W, C), C = 1, 3 or 4, as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()
