"""Batches for one device: its share of every global batch, from any step of the run on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_pl.data.crops import Crop
from diffusion_pl.data.draws import uniforms
from diffusion_pl.data.order import Order
from diffusion_pl.data.readers import AHEAD, Reader, ReaderLost
from diffusion_pl.data.source import Images
from diffusion_pl.errors import UserError


@dataclass(frozen=True)
class Share:
    """One device's part of every global batch: a run of neighbours, as long as the others'.

    Args:
        batch_size: images of an optimizer step over all devices.
        rank: this device, 0 .. world_size - 1.
        world_size: number of devices.

    Raises:
        UserError: world_size does not divide batch_size.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise UserError(
                f"a global batch of {self.batch_size} does not divide over "
                f"{self.world_size} devices"
            )

    def positions(self, step: int) -> range:
        """Positions in the run of this device's images of a step, both counted from 0."""
        size = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * size
        return range(first, first + size)


@dataclass(frozen=True)
class Resolutions:
    """Which resolution a step trains at: the same on every device, drawn from (seed, step).

    Args:
        shares: of the steps, by resolution; scaled to sum to 1.
        seed: of the run.

    Raises:
        UserError: no shares, or one that is not positive.
    """

    shares: Mapping[int, float]
    seed: int

    def __post_init__(self) -> None:
        if not self.shares or min(self.shares.values()) <= 0:
            raise UserError(f"data.shares must be positive numbers (got {dict(self.shares)})")

    def __call__(self, step: int) -> int:
        """The resolution of a step, counted from 0."""
        wanted = float(uniforms(self.seed, "resolution", torch.tensor([step])))
        wanted *= sum(self.shares.values())
        for resolution, share in self.shares.items():
            wanted -= share
            if wanted < 0:
                return resolution
        return resolution  # wanted was within a rounding of the sum


class Batches:
    """The run as a map from a step to this device's images of it.

    Args:
        images: the data set at every resolution that `resolutions` may name.
        order: which image stands where in the run.
        share: this device's cut.
        resolutions: which one a step takes; None: always the largest of `images`.
        hflip: mirror half of the images left to right, by (seed, position).
        crop: cut windows with their positions in a frame as wide as the largest of `images`.
    """

    def __init__(
        self,
        images: Mapping[int, Images],
        order: Order,
        share: Share,
        *,
        resolutions: Resolutions | None = None,
        hflip: bool = False,
        crop: Crop | None = None,
    ) -> None:
        self.images = images
        self.order = order
        self.share = share
        self.resolutions = resolutions
        self.hflip = hflip
        self.crop = crop

    @property
    def most_bytes(self) -> int:
        """No batch takes more: pixels and their coordinates at the largest size, two numbers."""
        side = max(self.images)
        channels, *_ = self.images[side].shape
        return len(self.share.positions(0)) * ((channels + 8) * side**2 + 16)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Args:
            step: of the optimizer, counted from 0.

        Returns:
            "image" uint8 (B, C, R, R), "index" int64 (B,), the positions in the run; "label" int64
            (B,) where the data has labels; "position" float32 (B, 2, R, R) where a crop tells it.
        """
        share = self.share.positions(step)
        positions = torch.arange(share.start, share.stop)
        indices = self.order(share.start, share.stop)
        frame = max(self.images)
        resolution = frame if self.resolutions is None else self.resolutions(step)
        images = self.images[resolution]
        image = images.read(indices)
        if self.hflip:
            # Before the crop, so a window's position is that of the mirrored image.
            flipped = uniforms(self.order.seed, "hflip", positions) < 0.5
            image = torch.where(flipped[:, None, None, None], image.flip(-1), image)
        batch = {"image": image, "index": positions}
        if self.crop is not None and self.crop.size < resolution:
            image, position = self.crop(image, positions, seed=self.order.seed, frame=frame)
            batch = batch | {"image": image} | ({"position": position} if self.crop.told else {})
        if images.labels is not None:
            batch["label"] = images.labels[indices]
        return batch


class Loader:
    """Iterates over a device's batches from a step of the run to its end.

    Its length is the whole run's, whatever the start: Lightning, resuming, counts the steps that
    are done as fetched.

    Args:
        batches: the run.
        start: first step.
        stop: the step after the last.
        workers: processes that read ahead; 0 reads in this process, best for images in memory.
        pin: copy to page-locked memory, for transfers to a GPU.
        timeout: seconds to wait for a batch of the workers.
    """

    def __init__(
        self,
        batches: Batches,
        start: int,
        stop: int,
        workers: int = 0,
        pin: bool = False,
        timeout: float = 300.0,
    ) -> None:
        self.batches = batches
        self.start = start
        self.stop = stop
        self.workers = workers
        self.pin = pin
        self.timeout = timeout

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.workers:
            return self._read_ahead()
        read = (self.batches[step] for step in range(self.start, self.stop))
        if self.pin:
            return ({k: v.pin_memory() for k, v in batch.items()} for batch in read)
        return read

    def _read_ahead(self) -> Iterator[dict[str, Tensor]]:
        """Let readers take the steps in turn.

        Raises:
            UserError: what a reader finds wrong with the data.
            ReaderLost: a reader was killed, or gave nothing for too long.
        """
        firsts = range(self.start, min(self.start + self.workers, self.stop))
        readers: list[Reader] = []
        try:
            for first in firsts:
                readers.append(Reader(self.batches, range(first, self.stop, self.workers)))
            for step in range(self.start, self.stop):
                reader = readers[(step - self.start) % self.workers]
                try:
                    batch = reader.next(self.timeout, self.pin)
                except ReaderLost as error:
                    raise ReaderLost(
                        f"a reading process is lost at step {step}; from there it reads "
                        f"{self._whence(step)}: {error}; look at that file's disk or server, at "
                        f"the memory"
                    ) from error
                yield batch
        finally:
            for reader in reversed(readers):  # later ones hold the lines of earlier ones, too
                reader.end()

    def _whence(self, step: int) -> str:
        """Which files hold the images of a step and those read ahead, as far as they are known."""
        batches, names = self.batches, set()
        images = batches.images[max(batches.images)]
        for ahead in range(step, min(self.stop, step + 1 + AHEAD * self.workers)):
            share = batches.share.positions(ahead)
            names |= {images.whence(i) for i in batches.order(share.start, share.stop).tolist()}
        return ", ".join(sorted(names)[:4]) + (
            f" and {len(names) - 4} more" if len(names) > 4 else ""
        )
