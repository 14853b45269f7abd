"""Images of one's own: a folder or a zip file of PNG, JPEG and WebP."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_pl import ranks
from diffusion_pl.data.dataset import load, reduced
from diffusion_pl.data.decode import Fit, check_channels, read_square
from diffusion_pl.data.depths import Depths
from diffusion_pl.data.files import Files
from diffusion_pl.data.layout import Listing, list_images
from diffusion_pl.data.splits import split_of
from diffusion_pl.errors import UserError
from diffusion_pl.images import Images
from diffusion_pl.names import plain, shown


@dataclass(frozen=True)
class _Decoded:
    """Image files as a store: an image is decoded when it is read."""

    files: Files
    names: list[str]
    where: str
    resolution: int
    fit: Fit
    channels: int
    depths: Depths = field(default_factory=Depths)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.names), self.channels, self.resolution, self.resolution)

    def read(self, indices: Tensor) -> Tensor:
        images = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)
        for row, index in enumerate(indices.tolist()):
            name = self.names[index]
            images[row] = read_square(
                self.files.read(name),
                self.resolution,
                self.fit,
                where=f"{self.where}/{name}",
                depths=self.depths,
                channels=self.channels,
            )
        return torch.from_numpy(images)


@dataclass(frozen=True)
class ImageFolder:
    """A folder or .zip of images, in the order of their relative paths.

    Conversion to RGB follows the table in `decode`. Opening decodes every image once, so a broken
    one is named before training begins; sets of more than 2 GiB are decoded again on each reading.

    Args:
        path: a folder, searched with its sub-folders, or a zip file. Hidden files, what systems
            leave in folders, and files that are no images are passed over.
        resolution: side in pixels.
        fit: `crop` to the central square, `pad` with white, or `exact` for images of that size.
        labels: images have classes: those of dataset.json or metadata.csv where there is one (see
            `layout`), else the first folder of a path is the image's class. Classes are numbered by
            name, and by number where all names are numbers.
        split: which of the folders train, val, test (and the like) to take, where there are such;
            `all` takes every one.
        channels: 3 for RGB, 1 for grey, 4 for RGB and a fourth, such as alpha.
    """

    path: str
    resolution: int
    fit: Fit = "crop"
    labels: bool = False
    split: str | None = None
    channels: int = 3

    def prepare(self) -> None:
        """Look through the names; nothing is written or decoded.

        Raises:
            UserError: nothing at `path`, no images, or folders that are no classes.
        """
        listing = self.listing()
        if ranks.leads_machine():
            for note in listing.notes:
                print(shown(f"{self.path}: {note}"), file=sys.stderr)

    def listing(self) -> Listing:
        """The images by name and class; nothing is decoded.

        Raises:
            UserError: as `prepare`.
        """
        if self.resolution < 1:
            raise UserError(f"{self.path}: resolution must be positive (got {self.resolution})")
        if self.fit not in ("crop", "pad", "exact"):
            raise UserError(f"{self.path}: fit is crop, pad or exact (got {self.fit!r})")
        check_channels(self.channels, self.path)
        return list_images(self.path, labels=self.labels, split=self.split)

    def validation(self) -> "ImageFolder | None":
        """The images of `val`, else of `test`, where `split` is train and there are such."""
        if self.split is None or split_of(self.split) != "train":
            return None
        for split in ("val", "test"):
            other = replace(self, split=split)
            try:
                other.listing()
            except UserError:
                continue
            return other
        return None

    def open(self, resolution: int | None = None) -> Images:
        """Decode all images, into memory where they fit.

        Args:
            resolution: less than its own, a whole fraction: the means of blocks of its pixels.

        Raises:
            UserError: as `prepare`, or an image that is broken or refused, by name.
        """
        listing = self.listing()
        path = Path(self.path)
        stem = path.stem if path.is_file() else path.resolve().name
        decoded = _Decoded(
            listing.files, listing.names, self.path, self.resolution, self.fit, self.channels
        )
        kind = {1: "-grey", 4: "-rgba"}.get(self.channels, "")
        found = listing.labels
        whole = load(
            f"folder-{plain(stem)}-{self.resolution}{kind}",
            decoded,
            None if found is None else torch.tensor(found.labels),
            classes=0 if found is None else found.classes,
            class_names=() if found is None else found.names or (),
        )
        line = decoded.depths.line()
        if line and ranks.leads_machine():
            print(shown(f"{self.path}: {line}"), file=sys.stderr)
        return reduced(whole, resolution)
