"""The data sets and statistics that a command line names by a word."""

from __future__ import annotations

from pathlib import Path

from diffusion_pl import config
from diffusion_pl.commands import parts
from diffusion_pl.data.cifar10 import CIFAR10
from diffusion_pl.data.decode import Fit, decode
from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.data.originals import kind_of
from diffusion_pl.data.shard_format import MANIFEST, Manifest
from diffusion_pl.data.shards import Shards
from diffusion_pl.data.source import Images, Source
from diffusion_pl.metrics import published, real_images
from diffusion_pl.metrics.features import Extractor
from diffusion_pl.metrics.reference import Reference

STATISTICS = (".safetensors", ".npz")


def source_of(named: str, resolution: int | None = None) -> Source:
    """The data set that a word names.

    Args:
        named: an experiment, for its data; or a prepared folder, a folder or .zip of images, or
            CIFAR-10's archive.
        resolution: side in pixels; None: the experiment's own, the largest that was prepared, or
            that of the images, which then must all be equal.

    Raises:
        ValueError: nothing there, or a kind that must be prepared first.
    """
    path = Path(named)
    if not path.exists():
        experiment = parts.read(named)
        source: Source = config.build(experiment, "data")
        return source
    if (path / MANIFEST).is_file():
        largest = Manifest.read(path).resolutions[0]
        return Shards(named, resolution or largest, batch_size=1)
    kind = kind_of(named)[0]
    if kind == "cifar10":
        return CIFAR10(named, batch_size=1)
    if kind not in ("folder", "zip"):
        raise ValueError(f"{named}: prepare it first: python -m diffusion_pl prepare {named} DEST")
    fit: Fit = "exact" if resolution is None else "crop"
    if resolution is None:
        resolution = _side(ImageFolder(named, 1, "exact", batch_size=1))
    return ImageFolder(named, resolution, fit, batch_size=1)


def images_of(named: str, resolution: int | None = None) -> Images:
    """The images of such a data set, at one resolution.

    Raises:
        ValueError: as `source_of`, or as the data set's own.
    """
    source = source_of(named, resolution)
    source.prepare()
    return source.open(None if resolution in (None, source.resolution) else resolution)


def reference_of(
    named: str, extractor: Extractor, *, resolution: int, keep: bool, device: str
) -> Reference:
    """What to compare with: a file of statistics, or a data set, measured once.

    Args:
        named: the file, or what `source_of` takes.
        extractor: the features.
        resolution: of the images to be compared, pixels.
        keep: with the features of single images.
        device: where to compute.

    Raises:
        ValueError: nothing there, or unfit.
    """
    path = Path(named)
    if path.is_file() and path.suffix in STATISTICS:
        return published.open_reference(path)
    images = images_of(named, resolution)
    return real_images.cached(parts.REFERENCES, images, extractor, keep=keep, device=device)


def _side(folder: ImageFolder) -> int:
    """The width of a folder's first image."""
    listing = folder.listing()
    name = listing.names[0]
    return decode(listing.files.read(name), where=f"{folder.path}/{name}").width
