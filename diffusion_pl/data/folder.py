"""Images of one's own: a folder or a zip file of PNG, JPEG and WebP."""

import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion_pl import ranks
from diffusion_pl.data.crops import Crop
from diffusion_pl.data.decode import Fit, read_square
from diffusion_pl.data.depths import Depths
from diffusion_pl.data.source import Images, load, reduced

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp"})

# Images by name that are not read: left out in silence they would be missed only by their count.
FOREIGN = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".ppm", ".tga", ".tif", ".tiff"}
)

# In a name: ends the line of a complaint, or moves the cursor of the terminal that shows it.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

# A file of more bytes than the largest image has when decoded holds something else.
LARGEST_FILE = 256 * 1024**2


class Files(Protocol):
    """Named files of a folder or an archive."""

    def names(self) -> list[str]:
        """Relative paths with forward slashes, in any order."""

    def read(self, name: str) -> bytes:
        """One file's bytes."""


@dataclass(frozen=True)
class _Folder:
    path: Path

    def names(self) -> list[str]:
        found: list[str] = []
        visited: set[str] = set()
        # Links are followed, as folders of classes are often linked together; never round a loop.
        for folder, _, files in os.walk(self.path, followlinks=True, onerror=self._refuse):
            real = os.path.realpath(folder)
            if real in visited:
                raise ValueError(f"{folder}: reached a second time, by a link; remove the link")
            visited.add(real)
            inside = PurePosixPath(Path(folder).relative_to(self.path).as_posix())
            found += [str(inside / name) for name in files]
        return found

    def _refuse(self, error: OSError) -> None:
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from error

    def read(self, name: str) -> bytes:
        path = self.path / name
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise ValueError(f"{path}: too large for an image")
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


@dataclass
class _Zip:
    path: Path
    # Open archive and the process that opened it: forked loader workers would share one file
    # position and read each other's bytes.
    _opened: tuple[int, zipfile.ZipFile] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_opened": None}

    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), zipfile.ZipFile(self.path))
            except Exception as error:
                # A directory that is no directory raises nearly anything.
                raise ValueError(f"{self.path}: not a readable zip file ({error})") from error
        return self._opened[1]

    def names(self) -> list[str]:
        # An entry without a name makes zipfile's own is_dir raise.
        entries = [each for each in self._archive().infolist() if each.filename[-1:] != "/"]
        names = [entry.filename for entry in entries]
        for name in names:
            _refuse_control(name, self.path)
        if len(set(names)) < len(names):
            [(twice, _)] = Counter(names).most_common(1)
            raise ValueError(f"{self.path}: {twice} is there twice")
        for entry in entries:
            if entry.filename.startswith("/") or ".." in entry.filename.split("/"):
                raise ValueError(f"{self.path}: {entry.filename} has an odd path")
            if entry.flag_bits & 1:
                raise ValueError(f"{self.path}: {entry.filename} is encrypted")
            if entry.file_size > LARGEST_FILE:
                raise ValueError(f"{self.path}: {entry.filename} is too large for an image")
        return names

    def read(self, name: str) -> bytes:
        try:
            # No more is unpacked than the entry announces, which `names` has limited.
            return self._archive().read(name)
        except Exception as error:
            # zipfile passes on whatever its decompressors raise, and KeyError if the file changed.
            raise ValueError(f"{self.path}: {name} is damaged ({error})") from error


def _refuse_control(name: str, where: object) -> None:
    """Refuse what would end or colour the line that names it."""
    if CONTROL.search(name):
        raise ValueError(f"{where}: {name!r} is an odd name; rename it")


def _top(name: str) -> str:
    return PurePosixPath(name).parts[0]


@dataclass(frozen=True)
class Listing:
    """What a folder or an archive holds.

    Args:
        files: to read from.
        names: of the images, in order.
        labels: class of each image, None without labels.
        classes: names of the classes in order, empty without labels.
    """

    files: Files
    names: list[str]
    labels: list[int] | None
    classes: list[str]


@dataclass(frozen=True)
class _Decoded:
    """Image files as a store: an image is decoded when it is read."""

    files: Files
    names: list[str]
    where: str
    resolution: int
    fit: Fit
    depths: Depths = field(default_factory=Depths)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.names), 3, self.resolution, self.resolution)

    def __getitem__(self, indices: Tensor) -> Tensor:
        images = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)
        for row, index in enumerate(indices.tolist()):
            name = self.names[index]
            data = self.files.read(name)
            where = f"{self.where}/{name}"
            images[row] = read_square(
                data, self.resolution, self.fit, where=where, depths=self.depths
            )
        return torch.from_numpy(images)


@dataclass(frozen=True)
class ImageFolder:
    """A folder or .zip of images as a source, in the order of their relative paths.

    Conversion to RGB follows the table in `decode`. Opening decodes every image once, so a broken
    one is named before training begins; sets of more than 2 GiB are decoded again on each reading.

    Args:
        path: a folder, searched with its sub-folders, or a zip file. Hidden files and files without
            an image's extension are passed over.
        resolution: side in pixels.
        fit: `crop` to the central square, `pad` with white, or `exact` for images of that size.
        labels: the first folder of a path is the image's class; classes are numbered by name.
        batch_size: images per optimizer step, over all devices.
        workers: loader workers per device, and threads that decode while opening.
        hflip: mirror images at random.
        shares: share of the steps at each resolution, whole fractions of `resolution`; None: all
            at `resolution`.
        crop: what window of each image a step sees; None: the whole.
    """

    path: str
    resolution: int
    fit: Fit = "crop"
    labels: bool = False
    _: KW_ONLY
    batch_size: int
    workers: int = 0
    hflip: bool = False
    shares: Mapping[int, float] | None = None
    crop: Crop | None = None

    @property
    def channels(self) -> int:
        """RGB."""
        return 3

    def prepare(self) -> None:
        """Look through the names; nothing is written or decoded.

        Raises:
            ValueError: nothing at `path`, no images, or folders that are no classes.
        """
        self.listing()

    def listing(self) -> Listing:
        """The images by name and class; nothing is decoded.

        Raises:
            ValueError: as `prepare`.
        """
        files = self._files()
        names = self._names(files)
        classes = self._classes(names)
        numbers = {name: number for number, name in enumerate(classes)}
        labels = [numbers[_top(name)] for name in names] if classes else None
        return Listing(files, names, labels, classes)

    def open(self, resolution: int | None = None) -> Images:
        """Decode all images, into memory where they fit.

        Args:
            resolution: less than the source's own: the means of blocks of its pixels.

        Raises:
            ValueError: as `prepare`, or an image that is broken or refused, by name.
        """
        listing = self.listing()
        path = Path(self.path)
        stem = path.stem if path.is_file() else path.resolve().name
        decoded = _Decoded(listing.files, listing.names, self.path, self.resolution, self.fit)
        whole = load(
            f"folder-{stem}-{self.resolution}",
            decoded,
            None if listing.labels is None else torch.tensor(listing.labels),
            classes=len(listing.classes),
            threads=max(1, self.workers),
        )
        line = decoded.depths.line()
        if line and ranks.leads_machine():
            print(f"{self.path}: {line}", file=sys.stderr)
        return reduced(whole, resolution, threads=max(1, self.workers))

    def _files(self) -> Files:
        if self.resolution < 1:
            raise ValueError(f"{self.path}: resolution must be positive (got {self.resolution})")
        if self.fit not in ("crop", "pad", "exact"):
            raise ValueError(f"{self.path}: fit is crop, pad or exact (got {self.fit!r})")
        path = Path(self.path)
        if path.is_dir():
            return _Folder(path)
        if path.is_file():
            return _Zip(path)
        raise ValueError(f"{self.path}: no such folder or zip file")

    def _names(self, files: Files) -> list[str]:
        names = []
        for name in sorted(files.names()):
            _refuse_control(name, self.path)
            parts = PurePosixPath(name).parts
            # __MACOSX holds the hidden halves of files that a Mac has packed.
            if "__MACOSX" in parts or any(part.startswith(".") for part in parts):
                continue
            extension = PurePosixPath(name).suffix.lower()
            if extension in FOREIGN:
                raise ValueError(
                    f"{self.path}/{name}: not PNG, JPEG or WebP; convert it or remove it"
                )
            if extension in EXTENSIONS:
                names.append(name)
        if not names:
            raise ValueError(f"{self.path}: no images here (looked for .png .jpg .jpeg .webp)")
        return names

    def _classes(self, names: list[str]) -> list[str]:
        """Class names in order; empty without labels."""
        if not self.labels:
            return []
        for name in names:
            if len(PurePosixPath(name).parts) < 2:
                raise ValueError(
                    f"{self.path}/{name}: in no folder, so without a class; move it into one or "
                    f"set labels: false"
                )
        classes = sorted({_top(name) for name in names})
        if len(classes) < 2:
            raise ValueError(
                f"{self.path}: the only class is {classes[0]!r}; folders of classes must lie at "
                f"the top, or set labels: false"
            )
        return classes
