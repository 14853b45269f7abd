"""The section `data` of an experiment, and the batches of one device from any step on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion_pl.data.crops import Crop
from diffusion_pl.data.dataset import DatasetSpec
from diffusion_pl.data.draws import uniforms
from diffusion_pl.data.order import Order
from diffusion_pl.data.readers import AHEAD, Reader, ReaderLostError
from diffusion_pl.errors import UserError
from diffusion_pl.images import ImageDataset


class Degradation(Protocol):
    """What a network that takes images is given of each; see diffusion/degradations.py."""

    @property
    def draws(self) -> int:
        """Random numbers that it needs for an image."""

    @property
    def times(self) -> int:
        """How many times smaller than the image what it leaves of it may also be stored."""

    def __call__(self, image: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Degrade images.

        Args:
            image: float32 (B, C, H, W) in [-1, 1].
            draws: float64 (B, `draws`) in [0, 1).

        Returns:
            source: float32 (B, C, H, W) in [-1, 1].
            mask: bool (B, 1, H, W), True where a pixel of it is known.
        """


def remains(
    degradation: Degradation, image: Tensor, numbers: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """What a network is given of clean images: `source` and `source_mask`.

    Args:
        degradation: applied to them.
        image: float32 (B, C, H, W) in [-1, 1].
        numbers: gives a number in [0, 1) for each image by the name of a stream, float64 (B,).
    """
    drawn = [numbers(f"image {n}") for n in range(degradation.draws)]
    draws = torch.stack(drawn, 1) if drawn else torch.zeros(len(image), 0)
    source, mask = degradation(image, draws)
    return {"source": source, "source_mask": mask}


@dataclass(frozen=True)
class DataConfig:
    """The data of an experiment: a data set, and how its batches are made.

    Args:
        dataset: which images; their largest resolution is the full frame.
        batch_size: images per optimizer step, over all devices.
        num_workers: processes per device that read ahead; 0 reads in the training process, best
            for images in memory.
        hflip: mirror half of the images left to right.
        resolution_weights: relative frequency of each resolution among the steps; None: always the
            largest.
        crop: random window of each image; None: the whole image.
        image: what a network that takes images is given of each; None for other networks.

    Raises:
        UserError: a number out of range.
    """

    dataset: DatasetSpec
    _: KW_ONLY
    batch_size: int
    num_workers: int = 0
    hflip: bool = False
    resolution_weights: Mapping[int, float] | None = None
    crop: Crop | None = None
    image: Degradation | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("num_workers", self.num_workers, 0),
        ):
            if value < least:
                raise UserError(f"data.{name} must be at least {least} (got {value})")
        weights = self.resolution_weights
        if weights is not None and (not weights or min(weights.values()) <= 0):
            raise UserError(f"data.resolution_weights must be positive (got {dict(weights)})")


class Loader:
    """The batches of one device from step `start` on; `loader[step]` is the batch of any step.

    Its length is that of the whole run: on resume Lightning counts the finished steps as fetched.

    Args:
        data: how the batches are made.
        images: the data set, opened at every resolution of the run.
        seed: of the order, the resolutions, the flips, the crops and the choice of captions.
        stop: the step after the last.
        start: the first step.
        rank: of this device, 0 .. world_size - 1.
        world_size: number of devices.
        pin: copy to page-locked memory, for transfers to a GPU.
        timeout: seconds to wait for a batch from a worker.

    Raises:
        UserError: world_size does not divide the batch.
    """

    def __init__(
        self,
        data: DataConfig,
        images: Mapping[int, ImageDataset],
        seed: int,
        stop: int,
        *,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
        timeout: float = 300.0,
    ) -> None:
        if data.batch_size % world_size:
            raise UserError(
                f"a global batch of {data.batch_size} does not divide over {world_size} devices"
            )
        self.data, self.images, self.seed = data, images, seed
        self.start, self.stop = start, stop
        self.rank, self.world_size = rank, world_size
        self.pin, self.timeout = pin, timeout
        self.frame = max(images)
        whole = images[self.frame]
        self.order = Order(len(whole), seed, whole.shards, whole.window)

    def positions(self, step: int) -> range:
        """Positions in the run of this device's images of a step, both counted from 0.

        The global batch is cut into contiguous parts of equal size, one a device.
        """
        size = self.data.batch_size // self.world_size
        first = step * self.data.batch_size + self.rank * size
        return range(first, first + size)

    def resolution(self, step: int) -> int:
        """The resolution of a step: the same on every device, a function of (seed, step)."""
        weights = self.data.resolution_weights
        if weights is None:
            return self.frame
        wanted = float(uniforms(self.seed, "resolution", torch.tensor([step])))
        wanted *= sum(weights.values())
        for resolution, weight in weights.items():
            wanted -= weight
            if wanted < 0:
                return resolution
        return resolution  # wanted was within a rounding of the sum

    @property
    def most_bytes(self) -> int:
        """Upper bound of a batch's bytes: pixels, their coordinates, index, label and text."""
        whole = self.images[self.frame]
        pixel = whole.channels + 8
        text = 0 if whole.texts is None else whole.texts.length * (2 * whole.texts.width + 1)
        return len(self.positions(0)) * (pixel * self.frame**2 + 16 + text)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Args:
            step: of the optimizer, counted from 0.

        Returns:
            "image" uint8 (B, C, R, R), "index" int64 (B,), the positions in the run; "label" int64
            (B,) where the data has labels; "text" float16 (B, L, E) and "text_mask" bool (B, L)
            where it has texts, of one caption an image; "position" float32 (B, 2, R, R) where a
            crop returns it.
        """
        share, crop = self.positions(step), self.data.crop
        positions = torch.arange(share.start, share.stop)
        indices = self.order(share.start, share.stop)
        resolution = self.resolution(step)
        images = self.images[resolution]
        image = images.read(indices)
        if self.data.hflip:
            # Before the crop, so a window's position is that of the mirrored image.
            flipped = uniforms(self.seed, "hflip", positions) < 0.5
            image = torch.where(flipped[:, None, None, None], image.flip(-1), image)
        batch = {"image": image, "index": positions}
        if crop is not None and crop.size < resolution:
            image, position = crop(image, positions, seed=self.seed, frame=self.frame)
            batch["image"] = image
            if crop.return_position:
                batch["position"] = position
        if images.labels is not None:
            batch["label"] = images.labels[indices]
        if images.texts is not None:
            choice = uniforms(self.seed, "caption", positions)
            shown = images.stand_ins(indices)
            batch["text"], batch["text_mask"] = images.texts.read(shown, choice)
        return batch

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.data.num_workers:
            return self._read_ahead()
        read = (self[step] for step in range(self.start, self.stop))
        if self.pin:
            return ({k: v.pin_memory() for k, v in batch.items()} for batch in read)
        return read

    def _read_ahead(self) -> Iterator[dict[str, Tensor]]:
        """Read by several processes, which take the steps in turn.

        Raises:
            UserError: damaged data.
            ReaderLostError: a reader was killed, or gave nothing for too long.
        """
        workers = self.data.num_workers
        readers: list[Reader] = []
        try:
            for first in range(self.start, min(self.start + workers, self.stop)):
                readers.append(Reader(self, range(first, self.stop, workers)))
            for step in range(self.start, self.stop):
                reader = readers[(step - self.start) % workers]
                try:
                    batch = reader.next(self.timeout, self.pin)
                except ReaderLostError as error:
                    raise ReaderLostError(
                        f"a reading process is lost at step {step}; from there it reads "
                        f"{self._origins(step)}: {error}; look at that file's disk or server, at "
                        f"the memory"
                    ) from error
                yield batch
        finally:
            for reader in reversed(readers):  # later ones hold the pipes of earlier ones, too
                reader.end()

    def _origins(self, step: int) -> str:
        """The files of the images of a step and of the steps read ahead, for messages."""
        images, names = self.images[self.frame], set()
        for ahead in range(step, min(self.stop, step + 1 + AHEAD * self.data.num_workers)):
            share = self.positions(ahead)
            names |= {images.origin(i) for i in self.order(share.start, share.stop).tolist()}
        return ", ".join(sorted(names)[:4]) + (
            f" and {len(names) - 4} more" if len(names) > 4 else ""
        )
