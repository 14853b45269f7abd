"""Synthetic images from a known random process: one coloured shape on a plain or patterned ground.

They need no download, their labels are true by construction, and a scene is a short list of numbers
that can be drawn at any resolution: 256 px averaged over 8x8 blocks is 32 px to within 5 of 255
levels.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from diffusion_pl import text
from diffusion_pl.data.captions import captions, without
from diffusion_pl.data.dataset import load
from diffusion_pl.data.encoding import text_table
from diffusion_pl.data.scenes import GROUNDS, Ground, Latents, latents
from diffusion_pl.data.shapes import SHAPES, Array
from diffusion_pl.errors import UserError
from diffusion_pl.images import Images
from diffusion_pl.scene_words import COLOURS
from diffusion_pl.texts import Captions

# Scenes are sampled on at least this grid, then averaged to the pixels that were asked for.
_FINEST = 160

# Points evaluated at a time: the working arrays stay in the processor's cache.
_POINTS = 2**19

VALIDATION = 256  # scenes that are not trained on


def render(scenes: Latents, resolution: int) -> npt.NDArray[np.uint8]:
    """Render scenes at a resolution; the bytes do not depend on how scenes are grouped in calls.

    Args:
        scenes: n scenes.
        resolution: side in pixels, any positive number.

    Returns:
        uint8 (n, 3, resolution, resolution), RGB.
    """
    # Points per pixel side, so that every resolution approximates the same integral over a pixel.
    fine = max(2, -(-_FINEST // resolution))
    images = np.empty((len(scenes), 3, resolution, resolution), dtype=np.uint8)
    length = max(1, _POINTS // (fine * resolution) ** 2)
    for first in range(0, len(scenes), length):
        chunk = scenes[first : first + length]
        images[first : first + length] = _draw(chunk, resolution, fine)
    return images


def _draw(scenes: Latents, resolution: int, fine: int) -> npt.NDArray[np.uint8]:
    """Composite shape over ground and average `fine` x `fine` points to a pixel.

    Colours are constant over a scene, so the average of the image is linear in the averages of
    three maps: the shape's cover, its cover times shade, and the ground's mix where uncovered.
    """
    side = resolution * fine
    axis = ((np.arange(side) + 0.5) / side).astype(np.float32)
    cover, shade = _foreground(scenes, axis)
    mix = _background(scenes, axis) * (1.0 - cover)
    cover, shade, mix = (_average(values, fine)[:, None] for values in (cover, cover * shade, mix))
    near, far, colour = (
        values[:, :, None, None] for values in (scenes.near, scenes.far, scenes.colour)
    )
    image = near * (1.0 - cover) + (far - near) * mix + colour * shade
    return np.clip(image * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8)


def _average(values: Array, fine: int) -> Array:
    """Means of `fine` x `fine` blocks, added in a fixed order (numpy's own sum may regroup)."""
    rows = values[:, 0::fine, :]
    for offset in range(1, fine):
        rows = rows + values[:, offset::fine, :]
    blocks = rows[:, :, 0::fine]
    for offset in range(1, fine):
        blocks = blocks + rows[:, :, offset::fine]
    return blocks / np.float32(fine * fine)


def _foreground(scenes: Latents, axis: Array) -> tuple[Array, Array]:
    """Cover and shade of the shape, each (n, side, side) in [0, 1], at points `axis` x `axis`."""
    cosine, sine = scenes.turn[:, 0, None, None], scenes.turn[:, 1, None, None]
    radius = scenes.radius[:, None, None]
    x = (axis[None, None, :] - scenes.centre[:, 0, None, None]) / radius
    y = (axis[None, :, None] - scenes.centre[:, 1, None, None]) / radius
    across = (cosine * x + sine * y) * scenes.side[:, None, None]
    down = cosine * y - sine * x
    distance = np.empty_like(across)
    for label, shape in enumerate(SHAPES.values()):
        rows = np.flatnonzero(scenes.label == label)
        if len(rows):
            distance[rows] = shape(across[rows], down[rows])
    # Half a point's width on either side of the outline is partly covered.
    cover = np.clip(0.5 - distance * (radius * len(axis)), 0.0, 1.0)
    depth = 1.0 - np.clip(distance * -5.0, 0.0, 1.0)
    shade = 1.0 - scenes.rim[:, None, None] * (depth * depth)
    return cover, shade


def _background(scenes: Latents, axis: Array) -> Array:
    """The mix of the colours `near` (0) and `far` (1): (n, side, side) in [0, 1]."""
    mix = np.zeros((len(scenes), len(axis), len(axis)), dtype=np.float32)
    for kind, name in enumerate(GROUNDS):
        rows = np.flatnonzero(scenes.ground == kind)
        if len(rows) and name != "flat":
            mix[rows] = _ground(name, scenes[rows], axis)
    return mix


def _ground(kind: str, scenes: Latents, axis: Array) -> Array:
    """The ground of scenes that share a kind: (n, side, side) in [0, 1]."""
    x = axis[None, None, :] - np.float32(0.5)
    y = axis[None, :, None] - np.float32(0.5)
    if kind in ("radial", "blobs"):
        bumps = [_bump(scenes.spots[:, spot] - np.float32(0.5), x, y) for spot in range(3)]
        if kind == "radial":
            return bumps[0]
        return 1.0 - (1.0 - bumps[0]) * (1.0 - bumps[1]) * (1.0 - bumps[2])
    cosine, sine = scenes.heading[:, 0, None, None], scenes.heading[:, 1, None, None]
    along = cosine * x + sine * y
    if kind == "linear":
        # The corners lie at most half a diagonal from the centre.
        return 0.5 + along * np.float32(0.7071)
    cycles = scenes.cycles[:, None, None]
    waves = _wave(along * cycles + scenes.phase[:, 0, None, None])
    if kind == "checks":
        across = cosine * y - sine * x
        waves = waves * _wave(across * cycles + scenes.phase[:, 1, None, None])
    return 0.5 + 0.5 * waves


def _bump(spot: Array, x: Array, y: Array) -> Array:
    """1 at a spot (n, 2), falling to 1/4 at a quarter of the image side from it."""
    x, y = x - spot[:, 0, None, None], y - spot[:, 1, None, None]
    bump = 1.0 / (1.0 + 16.0 * (x * x + y * y))
    return bump * bump


def _wave(periods: Array) -> Array:
    """A soft square wave in [-1, 1] of period 1, made of parabolas rather than a sine."""
    triangle = np.abs(periods - np.floor(periods) - np.float32(0.5)) * 4.0 - 1.0
    steep = np.clip(triangle * 1.5, -1.0, 1.0)
    return steep * (1.5 - 0.5 * steep * steep)


@dataclass(frozen=True)
class _Rendered:
    """Scenes as a store: an image is rendered when it is read."""

    scenes: Latents
    resolution: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.scenes), 3, self.resolution, self.resolution)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(render(self.scenes[indices.numpy()], self.resolution))


@dataclass(frozen=True)
class Synthetic:
    """Synthetic images; `count` images are the first ones of any longer set.

    Args:
        count: number of images.
        resolution: side in pixels; the same scenes at every resolution.
        seed: which scenes; use another seed for images to measure against.
        grounds: the kinds of ground there may be, of flat, linear, radial, stripes, checks, blobs;
            all when not given. Fewer are sooner learned.
        shapes: the same of the shapes: disc, ring, crescent, heart, triangle, square, cross, star.
            An image's label is its shape's place in this list.
        captions: encoder of a caption for each image, `minilm` or another of diffusion_pl.text;
            None: no captions.
        caption_length: tokens that a caption is padded or cut to.
        held_out: (shape, colour) pairs that no image has, by the names of captions; the scenes
            that have one are left out, and later ones take their place.
    """

    count: int = 10_000
    resolution: int = 32
    seed: int = 0
    grounds: Sequence[Ground] = GROUNDS
    shapes: Sequence[str] = tuple(SHAPES)
    captions: str | None = None
    caption_length: int = 24
    held_out: Sequence[tuple[str, str]] = ()

    @property
    def channels(self) -> int:
        """RGB."""
        return 3

    def prepare(self) -> None:
        """Check the settings; nothing is written.

        Raises:
            UserError: a number out of range.
        """
        for name, value, least in (
            ("count", self.count, 1),
            ("resolution", self.resolution, 8),
            ("seed", self.seed, 0),
        ):
            if not least <= value < 2**63:
                raise UserError(f"synthetic data: {name} must be at least {least} (got {value})")
        for key, chosen, known in (
            ("grounds", self.grounds, GROUNDS),
            ("shapes", self.shapes, tuple(SHAPES)),
        ):
            if not chosen or not set(chosen) <= set(known) or len(set(chosen)) < len(chosen):
                raise UserError(
                    f"synthetic data: {key} are of {', '.join(known)}, each once "
                    f"(got {list(chosen)})"
                )
        for shape, colour in self.held_out:
            if shape not in self.shapes or colour not in COLOURS:
                raise UserError(
                    f"synthetic data: held_out are pairs of a shape of {', '.join(self.shapes)} "
                    f"and a colour of {', '.join(COLOURS)} (got {[shape, colour]})"
                )
        if len({tuple(pair) for pair in self.held_out}) >= len(self.shapes) * len(COLOURS):
            raise UserError("synthetic data: held_out leaves no pair of shape and colour")
        if self.captions is not None:
            text.encoder(self.captions, length=self.caption_length)

    def validation(self) -> "Synthetic":
        """Other scenes of the same kind: the first of the next seed, at most 256."""
        return dataclasses.replace(self, seed=self.seed + 1, count=min(self.count, VALIDATION))

    def scenes(self) -> tuple[Latents, npt.NDArray[np.int64]]:
        """The scenes of the images, and their indices in the random process."""
        if not self.held_out:
            scenes = latents(self.seed, 0, self.count, self.grounds, self.shapes)
            return scenes, np.arange(self.count)
        pairs = len(self.shapes) * len(COLOURS)
        found: list[npt.NDArray[np.int64]] = []
        first, missing = 0, self.count
        while missing:
            more = missing * pairs // (pairs - len(self.held_out)) + 1
            scenes = latents(self.seed, first, more, self.grounds, self.shapes)
            kept = first + np.flatnonzero(without(scenes, self.held_out))[:missing]
            found.append(kept)
            first, missing = first + more, missing - len(kept)
        indices = np.concatenate(found)
        last = int(indices[-1]) + 1
        return latents(self.seed, 0, last, self.grounds, self.shapes)[indices], indices

    def open(self, resolution: int | None = None) -> Images:
        """Render the images into memory where they fit, else whenever they are read.

        Args:
            resolution: side in pixels, its own when not given.

        Raises:
            UserError: a number out of range.
        """
        self.prepare()
        resolution = resolution or self.resolution
        scenes, indices = self.scenes()
        place = {list(SHAPES).index(name): label for label, name in enumerate(self.shapes)}
        chosen = [
            name
            for names, known in ((self.shapes, SHAPES), (self.grounds, GROUNDS))
            if set(names) != set(known)
            for name in names
        ]
        if self.held_out:
            chosen.append(f"without-{len(self.held_out)}-pairs")
        images = load(
            "-".join(["synthetic", str(resolution), *chosen]),
            _Rendered(scenes, resolution),
            torch.tensor([place[shape] for shape in scenes.label.tolist()]),
            classes=len(self.shapes),
            class_names=list(self.shapes),
        )
        if self.captions is None:
            return images
        words = Captions.of([each] for each in captions(scenes, self.seed, indices.tolist()))
        encoder = text.encoder(self.captions, length=self.caption_length)
        return dataclasses.replace(images, texts=text_table(words, encoder))
