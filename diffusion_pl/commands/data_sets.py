"""The data sets and statistics that a command line can name."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

from diffusion_pl import config
from diffusion_pl.commands import parts
from diffusion_pl.data.cifar10 import CIFAR10
from diffusion_pl.data.dataset import DatasetSpec
from diffusion_pl.data.decode import Fit, decode
from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.data.shard_format import MANIFEST, Manifest
from diffusion_pl.data.shards import Shards
from diffusion_pl.data.sources.open import kind_of
from diffusion_pl.errors import UserError
from diffusion_pl.images import ImageDataset
from diffusion_pl.interop import statistics
from diffusion_pl.metrics import published, real_images
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.reference import Reference
from diffusion_pl.names import shown

STATISTICS = (".safetensors", ".npz", ".pkl")


def source_of(named: str, resolution: int | None = None, *, text: str | None = None) -> DatasetSpec:
    """The data set of a name or path.

    Args:
        named: an experiment, for its data; or a prepared folder, a folder or .zip of images, or
            CIFAR-10's archive.
        resolution: side in pixels; None: the experiment's own, the largest prepared one, or that of
            the images, which must then be equal.
        text: the encoder whose token states of a prepared folder's captions are wanted.

    Raises:
        UserError: there is none, or it must be prepared first.
    """
    path = Path(named)
    if not path.exists():
        experiment = parts.read(named)
        source: DatasetSpec = config.build(experiment, "data.dataset")
        return source
    if (path / MANIFEST).is_file():
        largest = Manifest.read(path).resolutions[0]
        return Shards(named, resolution or largest, text=text)
    kind = kind_of(named)[0]
    if kind == "cifar10":
        return CIFAR10(named)
    if kind not in ("folder", "zip"):
        raise UserError(f"{named}: prepare it first: python -m diffusion_pl prepare {named} DEST")
    fit: Fit = "exact" if resolution is None else "crop"
    if resolution is None:
        resolution = _side(ImageFolder(named, 1, "exact"))
    return ImageFolder(named, resolution, fit)


def images_of(
    named: str, resolution: int | None = None, *, text: str | None = None
) -> ImageDataset:
    """The images of such a data set, at one resolution.

    Raises:
        UserError: as `source_of`, or as the data set's own.
    """
    source = source_of(named, resolution, text=text)
    source.prepare()
    return source.open(None if resolution in (None, source.resolution) else resolution)


def reference_of(
    named: str,
    extractor: Extractor,
    *,
    resolution: int,
    keep: bool,
    device: str,
    resize: bool = False,
) -> Reference:
    """The reference of a file of statistics or a data set, whose statistics are cached.

    Args:
        named: the file, or what `source_of` takes.
        extractor: of the features.
        resolution: of the images to be compared, pixels.
        keep: also keep the features of single images.
        device: to compute on.
        resize: enlarge smaller images.

    Raises:
        UserError: there is none, it is unfit, or its images are smaller than those compared.
    """
    path = Path(named)
    if path.is_file() and path.suffix == ".pkl":
        return statistics.open_reference(path, extractor)
    if path.is_file() and path.suffix in STATISTICS:
        measuring = published.Measuring(extractor, parts.REFERENCES, keep, device)
        return published.open_reference(path, measuring)
    source = source_of(named, resolution)
    if isinstance(source, ImageFolder):
        _compare_sizes(source, resize)
    source.prepare()
    images = source.open(None if resolution == source.resolution else resolution)
    return real_images.cached(parts.REFERENCES, images, extractor, keep=keep, device=device)


def _compare_sizes(folder: ImageFolder, resize: bool) -> None:
    """Refuse to enlarge images unless `resize`; print where they are downsampled.

    Raises:
        UserError: names the smallest image.
    """
    listing, wanted = folder.listing(), folder.resolution
    sides = {name: _shorter(listing.files.read(name)) for name in listing.names}
    smallest = min(sides, key=lambda name: sides[name] or wanted)
    if (least := sides[smallest] or wanted) < wanted and not resize:
        raise UserError(
            f"{folder.path}/{smallest}: is of {least} px, and the images to be measured of "
            f"{wanted}; compare with images of their size, or enlarge it: --resize"
        )
    if any((side or wanted) > wanted for side in sides.values()):
        print(shown(f"{folder.path}: its images are downsampled to {wanted} px"), file=sys.stderr)


def _shorter(content: bytes) -> int | None:
    """The shorter side of an image in pixels; None if it is broken, which opening will report."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return min(picture.size)
    except Exception:  # Pillow raises nearly anything
        return None


def _side(folder: ImageFolder) -> int:
    """The width of a folder's first image."""
    listing = folder.listing()
    name = listing.names[0]
    return decode(listing.files.read(name), where=f"{folder.path}/{name}").width
